// The leaderboard: a click on a column sorts by it, best first; typing filters long tables.

export const addLeaderboard = () => {
  const table = document.getElementById("heads");
  const rows = [...table.tBodies[0].rows];
  const places = new Map(rows.map((row, place) => [row, place]));
  const headings = [...table.tHead.rows[0].cells];
  const said = document.getElementById("heads-said");
  const filter = document.getElementById("heads-filter");

  const valueOf = (row, i) => {
    const value = row.cells[i].dataset.value;
    if (value === undefined) return row.cells[i].textContent.trim().toLowerCase();
    return value === "" ? null : Number(value);
  };

  const compare = (a, b, falling) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = a < b ? -1 : Number(a > b);
    return falling ? -order : order;
  };

  const sortBy = (i) => {
    const numeric = rows.some((row) => row.cells[i].dataset.value !== undefined);
    const before = headings[i].getAttribute("aria-sort");
    const best = numeric && headings[i].dataset.best !== "lowest";
    const falling = before ? before === "ascending" : best;
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[i].setAttribute("aria-sort", falling ? "descending" : "ascending");
    rows.sort((a, b) => compare(valueOf(a, i), valueOf(b, i), falling) || places.get(a) - places.get(b));
    table.tBodies[0].append(...rows);
    said.textContent = `Sorted by ${headings[i].textContent}, ${falling ? "highest" : "lowest"} first.`;
  };

  headings.forEach((heading, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sortBy(i));
    heading.replaceChildren(button);
  });

  if (!filter) return;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const name = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word));
      shown += Number(!row.hidden);
    }
    said.textContent = `${shown} of ${rows.length} heads shown.`;
  });
  document.getElementById("heads-tools").hidden = false;
};
