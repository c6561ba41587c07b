"""Map a DICOM file's coded elements to manifest terms: region, laterality, view, age, sex.

Only terms from these tables are returned. Free text in an element that should hold a code may name
a patient, and regions and covariates are copied into runs and models; a value that is not in a
table therefore becomes unknown or empty.
"""

import re
from typing import Any

from medembed.core.text import normalise

__all__ = ["age_in_years", "laterality", "name_region", "region", "sex", "text", "view"]

# MURA's seven regions and others; Body Part Examined (PS3.16, annex L) and vendors' ways to write
# it, and the meanings of CID 4 and 4031 (anatomic regions). Letters only.
_SYNONYMS = {
    "finger": "fingers thumb indexfinger middlefinger ringfinger littlefinger digit",
    "hand": "hands metacarpus metacarpal",
    "wrist": "wristjoint wrists carpus carpal scaphoid",
    "forearm": "radiusulna radiusandulna radius ulna lowerarm",
    "elbow": "elbowjoint elbows",
    "humerus": "upperarm arm",
    "shoulder": "shoulderjoint shoulders acjoint acromioclavicularjoint",
    "clavicle": "clavicula",
    "scapula": "",
    "toe": "toes",
    "foot": "feet",
    "heel": "calcaneus oscalcis",
    "ankle": "anklejoint ankles tarsaljoint",
    "lower leg": "tibiafibula tibiaandfibula tibfib tibia fibula leg",
    "knee": "kneejoint knees",
    "patella": "",
    "femur": "thigh upperleg",
    "hip": "hipjoint hips",
    "pelvis": "",
    "sacrum": "sacroiliacjoint sijoint coccyx sacrococcygealspine",
    "lumbar spine": "lspine lumbosacralspine lsspine",
    "thoracic spine": "tspine dorsalspine thoracolumbarspine tlspine",
    "cervical spine": "cspine cervicothoracicspine",
    "spine": "wholespine",
    "rib": "ribs",
    "sternum": "sternoclavicularjoint",
    "chest": "thorax lung",
    "abdomen": "kub abdomenandpelvis",
    "breast": "",
    "neck": "",
    "skull": "head cranium",
    "face": "facialbones orbit orbits zygoma nasalbone nose sinuses paranasalsinus maxilla",
    "jaw": "mandible jawregion tmj temporomandibularjoint teeth",
    "upper limb": "upperextremity boneofupperlimb",
    "lower limb": "lowerextremity boneoflowerlimb",
    "extremity": "extremities joint",
    "whole body": "wholebody entirebody",
}
_REGIONS = {
    word: name
    for name, words in _SYNONYMS.items()
    for word in (name.replace(" ", ""), *words.split())
}
_VAGUE = ("extremity", "upper limb", "lower limb", "unknown")
_SIDES = {"left", "right", "lt", "rt", "l", "r", "both", "bilateral"}
# SNOMED CT codes of CID 4031, for files whose code meaning is in another language.
_REGION_CODES = {
    "7569003": "finger",
    "76505004": "finger",
    "85562004": "hand",
    "74670003": "wrist",
    "14975008": "forearm",
    "16953009": "elbow",
    "85050009": "humerus",
    "40983000": "humerus",
    "16982005": "shoulder",
    "85856004": "shoulder",
    "51299004": "clavicle",
    "79601000": "scapula",
    "29707007": "toe",
    "56459004": "foot",
    "80144004": "heel",
    "70258002": "ankle",
    "30021000": "lower leg",
    "72696002": "knee",
    "64234005": "patella",
    "71341001": "femur",
    "68367000": "femur",
    "29836001": "hip",
    "24136001": "hip",
    "816092008": "pelvis",
    "122496007": "lumbar spine",
    "122495006": "thoracic spine",
    "122494005": "cervical spine",
    "421060004": "spine",
    "113197003": "rib",
    "816094009": "chest",
    "818981001": "abdomen",
    "89546000": "skull",
}
_VIEWS = {  # View Position (PS3.3 C.8.1.6.2 and vendors'), and CID 4010 (DX view)
    **{name: name for name in ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO")},
    **dict.fromkeys(("LAT", "LATERAL", "399067008"), "LATERAL"),
    **dict.fromkeys(("OBL", "OBLIQUE", "399182000"), "OBLIQUE"),
    **dict.fromkeys(("AXIAL", "399061009"), "AXIAL"),
    **dict.fromkeys(("TANGENTIAL", "399110001"), "TANGENTIAL"),
    "399348003": "AP",
    "272479007": "PA",
    "399173006": "LL",
    "399198007": "RL",
    "399352003": "LATERAL",
    "399260004": "LATERAL",
    "399184004": "LLO",
    "399236003": "RLO",
    "260426006": "OBLIQUE",
    "260427002": "OBLIQUE",
}
_AGE = re.compile(r"(\d{3})([DWMY])")  # PS3.5, table 6.2-1: AS
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
OLDEST = 90.0  # years; a higher age can identify a person (45 CFR 164.514(b)(2)(i)(C))


def text(dataset: Any, keyword: str) -> str:
    """Return an element's first value, spelled as by `text.normalise`."""
    value = dataset.get(keyword)
    if value is not None and not isinstance(value, str) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    return "" if value is None else normalise(str(value).strip(" \0"))


def region(dataset: Any) -> str:
    """Return the body part: Anatomic Region Sequence, else Body Part Examined, else "unknown"."""
    found = "unknown"
    for code, words in (*_codes(dataset, "AnatomicRegionSequence"), ("", "BodyPartExamined")):
        name = _REGION_CODES.get(code) or name_region(words if code else text(dataset, words))
        if name != "unknown":
            found = name
        if name not in _VAGUE:
            break
    return found


def laterality(dataset: Any) -> str:
    """Return R, L, B (both), U (unpaired) or nothing (PS3.3 C.8.11.1, C.7.3.1)."""
    for keyword in ("ImageLaterality", "Laterality", "FrameLaterality"):
        value = text(dataset, keyword).upper()
        if value in ("R", "L", "B", "U"):
            return value
    return ""


def view(dataset: Any) -> str:
    """Return the view, such as AP, PA, LATERAL, OBLIQUE, or nothing."""
    codes = [code for code, _ in _codes(dataset, "ViewCodeSequence")]
    for value in (*codes, text(dataset, "ViewPosition").upper()):
        if value in _VIEWS:
            return _VIEWS[value]
    return ""


def age_in_years(dataset: Any, *, cap: bool) -> str:
    """Return Patient's Age in years with at most two decimals, limited to 90 if `cap` is set."""
    found = _AGE.fullmatch(text(dataset, "PatientAge").upper())
    if not found:
        return ""
    years = int(found[1]) * _YEARS[found[2]]
    return f"{round(min(years, OLDEST) if cap else years, 2):g}"


def sex(dataset: Any) -> str:
    """Return M, F, O or nothing (PS3.3 C.7.1.1)."""
    value = text(dataset, "PatientSex").upper()
    return value if value in ("M", "F", "O") else ""


def _codes(dataset: Any, keyword: str) -> list[tuple[str, str]]:
    """Read code values and meanings of a sequence of codes (PS3.3 8.8)."""
    items = dataset.get(keyword) or ()
    return [(text(item, "CodeValue") or "none", text(item, "CodeMeaning")) for item in items]


def name_region(words: str) -> str:
    """Return the body part that words name, whatever side they add; else "unknown"."""
    parts = re.findall("[a-z]+", words.lower())
    for letters in (parts, [part for part in parts if part not in _SIDES]):
        if name := _REGIONS.get("".join(letters)):
            return name
    return "unknown"
