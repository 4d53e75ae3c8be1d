"use strict";
// Search and sort the samples of a page, also of one whose sections are put in anew.
const samples = (() => {
  const texts = new WeakMap();
  const servedOrder = new WeakMap();

  function textOf(sample) {
    if (!texts.has(sample)) texts.set(sample, sample.textContent.toLowerCase());
    return texts.get(sample);
  }

  function filter() {
    const search = document.querySelector("[data-filters]");
    if (!search) return;
    const wanted = search.value.trim().toLowerCase();
    const all = Array.from(document.querySelectorAll(search.dataset.filters));
    for (const sample of all) sample.hidden = !textOf(sample).includes(wanted);
    const found = all.filter((sample) => !sample.hidden).length;
    search.closest("div").querySelector("output").textContent = all.length ? `${found} of ${all.length}` : "";
  }

  function order() {
    const list = document.querySelector(".samples");
    if (!list) return;
    const controls = document.querySelector(".controls");
    const { value } = controls.querySelector("select");
    if (!servedOrder.has(list)) servedOrder.set(list, Array.from(list.children));
    const served = servedOrder.get(list);
    const [place, sign] = value.split(" ").map(Number);
    const change = (sample) => Number(sample.dataset.changes.split(" ")[place]);
    list.append(...(value ? served.toSorted((a, b) => sign * (change(a) - change(b))) : served));
    controls.hidden = false;
  }

  document.addEventListener("input", (event) => event.target.matches("[data-filters]") && filter());
  document.addEventListener("change", (event) => event.target.matches(".controls select") && order());
  return () => {
    filter();
    order();
  };
})();
// A browser may keep what stood in the fields when the page is loaded anew.
samples();
