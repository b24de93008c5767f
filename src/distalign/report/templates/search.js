"use strict";
// Without this every sample is shown; with it, those that have the words that are searched for.
const search = document.getElementById("search");
if (search) {
  const samples = [...document.querySelectorAll(".sample")], count = document.getElementById("count");
  search.parentElement.hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.trim().toLowerCase();
    for (const sample of samples) sample.hidden = !sample.textContent.toLowerCase().includes(words);
    count.textContent = words ? `${samples.filter((sample) => !sample.hidden).length} of ${samples.length}` : "";
  });
}
