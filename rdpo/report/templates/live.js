"use strict";
// Ask the server now and then how far the run has come, and put in the sections that have changed.
const look = (() => {
  const EVERY_MS = 3000;
  const BAR = 80;
  const main = document.querySelector("main");
  const nameOf = (section) => section.id || section.tagName;
  // As they came: since then a reader may have opened and sorted things.
  const served = new Map(Array.from(main.children, (section) => [nameOf(section), section.outerHTML]));

  // Sections and what can be opened in them, each by a name that it has again when it is put in anew.
  function placesIn(section) {
    const places = new Map([[nameOf(section), section]]);
    for (const details of section.querySelectorAll("details")) {
      const name = `${nameOf(section)} ${details.querySelector("summary").textContent}`;
      let number = 0;
      while (places.has(`${name} ${number}`)) number += 1;
      places.set(`${name} ${number}`, details);
    }
    return places;
  }

  function places() {
    return new Map(Array.from(main.children).flatMap((section) => Array.from(placesIn(section))));
  }

  // What a reader has opened and chosen in a section stays so in the one that takes its place.
  function keepChoices(old, fresh) {
    const known = placesIn(old);
    for (const [name, place] of placesIn(fresh)) {
      if (place.matches("details") && known.has(name)) place.open = known.get(name).open;
    }
    const chosen = old.querySelectorAll("select");
    fresh.querySelectorAll("select").forEach((select, index) => {
      if (chosen[index]) select.value = chosen[index].value;
    });
  }

  function put(fresh, index) {
    const html = fresh.outerHTML;
    const old = Array.from(main.children).find((section) => nameOf(section) === nameOf(fresh));
    if (old && served.get(nameOf(fresh)) === html) return;
    served.set(nameOf(fresh), html);
    if (old) {
      keepChoices(old, fresh);
      old.replaceWith(fresh);
    } else {
      main.insertBefore(fresh, main.children[index] ?? null);
    }
  }

  // What stands at the top of the window stays there, however much is put in above it.
  function inPlace(change) {
    const tops = Array.from(places(), ([name, place]) => [name, place.getBoundingClientRect().top]);
    const above = tops.filter(([, top]) => top <= BAR).reverse();
    change();
    const now = places();
    // The nearest that is still there.
    const kept = window.scrollY > 0 && above.find(([name]) => now.has(name));
    if (kept) window.scrollBy(0, now.get(kept[0]).getBoundingClientRect().top - kept[1]);
  }

  const parsed = (html) => new DOMParser().parseFromString(html, "text/html");

  async function asked(address) {
    const response = await fetch(address).catch(() => {
      throw new Error("rdpo watch does not answer; the page shows what was last seen");
    });
    if (!response.ok) throw new Error(await response.text());
    return response;
  }

  async function renew() {
    const page = parsed(await (await asked(location.href)).text()).querySelector("main");
    const sections = Array.from(page.children);
    const names = new Set(sections.map(nameOf));
    inPlace(() => {
      for (const section of Array.from(main.children)) {
        if (!names.has(nameOf(section))) section.remove();
      }
      sections.forEach(put);
      samples();
    });
    main.dataset.version = page.dataset.version;
  }

  async function look() {
    const state = await (await asked(`state${location.search}`)).json();
    document.querySelector("#now").textContent = state.now;
    inPlace(() => put(parsed(state.progress).querySelector("section"), 1));
    if (state.version !== main.dataset.version) await renew();
  }

  async function goOn() {
    const trouble = document.querySelector("#trouble");
    try {
      if (!document.hidden) await look();
      trouble.textContent = "";
    } catch (error) {
      trouble.textContent = error.message;
    }
    setTimeout(goOn, EVERY_MS);
  }

  return () => setTimeout(goOn, EVERY_MS);
})();
look();
