"use strict";
const rows = [...document.querySelectorAll("#servers tbody tr")];
const filter = document.getElementById("filter");
const state = document.getElementById("state");
const shown = document.getElementById("shown");

function narrow() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const fits = words.every((word) => row.dataset.text.includes(word)) &&
      (!state.value || row.dataset.state.split(" ").includes(state.value));
    row.hidden = !fits;
    count += fits;
  }
  shown.textContent = count + " of " + rows.length + " shown";
}

function sort(button) {
  const head = button.closest("th");
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const column = [...head.parentElement.children].indexOf(head);
  const key = (row) => row.children[column].dataset.key;
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    return isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
  };
  rows.sort((a, b) => (down ? -1 : 1) * compare(a, b));
  document.querySelector("#servers tbody").append(...rows);
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

if (filter) {
  filter.addEventListener("input", narrow);
  state.addEventListener("change", narrow);
  for (const button of document.querySelectorAll("#servers thead button")) {
    button.addEventListener("click", () => sort(button));
  }
  narrow();
}
document.getElementById("theme").addEventListener("click", theme);
