"""Embed a manifest on Modal, images and cache in a bucket.

    modal run examples/modal_extract.py --manifest mura.csv --image-root s3://bucket/MURA-v1.1 \
        --cache s3://bucket/mura --workers 8

Containers need no coordinator: each takes the images that fall to it, and one that ends early is
started again and goes on where the cache ends. The secret `bucket` holds what reaches the bucket
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), `huggingface` an HF_TOKEN of somebody who
has accepted MedGemma's terms.
"""

import subprocess
from pathlib import Path

import modal

ENCODER = "google/medgemma-4b-pt"

image = modal.Image.from_dockerfile("examples/Dockerfile", context_dir=".").entrypoint([])
app = modal.App("medembed", image=image)


@app.function(
    gpu="L4",
    cpu=4,
    timeout=4 * 60 * 60,
    retries=10,
    secrets=[modal.Secret.from_name("bucket"), modal.Secret.from_name("huggingface")],
)
def extract_share(manifest: bytes, image_root: str, encoder: str, cache: str, worker: str) -> None:
    """Embed one worker's share, such as 0/8 for the first of eight."""
    path = Path("/tmp/manifest.csv")
    path.write_bytes(manifest)
    command = ["medembed", "extract", str(path), "--image-root", image_root]
    command += ["--encoder", encoder, "--cache", cache, "--worker", worker]
    subprocess.run(command, check=True)


@app.local_entrypoint()
def main(
    manifest: str, image_root: str, cache: str, encoder: str = ENCODER, workers: int = 8
) -> None:
    """Start all workers, and wait for them."""
    data = Path(manifest).read_bytes()
    shares = [(data, image_root, encoder, cache, f"{k}/{workers}") for k in range(workers)]
    list(extract_share.starmap(shares))
