"use strict";
// A click on a heading sorts its table by that column: first the largest first, then the smallest.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const words = head.dataset.sort === "words";
      const first = words ? "ascending" : "descending";
      const now = head.getAttribute("aria-sort");
      const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const value = (row) => {
        const cell = row.cells[column];
        if (words) return cell.textContent;
        const number = parseFloat(cell.dataset.value ?? cell.textContent);
        return Number.isNaN(number) ? -1 : number;
      };
      const compare = (x, y) => (words ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      const sign = order === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((x, y) => sign * compare(value(x), value(y))));
    });
  });
}
