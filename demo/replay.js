// Run by the component of the race: shows both columns side by side on their recorded clocks.
const still = matchMedia("(prefers-reduced-motion: reduce)");

function show(lane, now) {
  let tokens = 0;
  for (const piece of lane.pieces) {
    const isThere = piece.dataset.t <= now;
    piece.style.visibility = isThere ? "" : "hidden";
    if (isThere) { tokens += Number(piece.dataset.n); lane.last = piece; }
  }
  const clock = Math.min(now, lane.seconds);
  lane.figure("seconds").textContent = clock.toFixed(2);
  lane.figure("tokens").textContent = tokens;
  lane.figure("tokens/s").textContent = clock > 0 ? Math.round(tokens / clock) : 0;
  lane.text.scrollTop = lane.last ? lane.last.offsetTop - lane.text.offsetTop - lane.text.clientHeight + 40 : 0;
}

function play() {
  const race = element.querySelector("[data-replay]");
  element.dataset.replaying = "";
  clearInterval(element.replay);
  if (!race) return;
  const banner = race.querySelector(".pard-banner"), [verdict, again] = banner.children;
  const ended = banner.dataset.ended ??= verdict.textContent, kind = banner.dataset.kind ??= banner.className;
  const lanes = [...race.querySelectorAll("section")].map((section) => {
    const pieces = [...section.querySelectorAll("[data-t]")], text = section.querySelector("pre");
    const figure = (name) => section.querySelector(`[data-figure="${name}"]`);
    section.classList.remove("pard-first");
    return { section, pieces, text, figure, seconds: Number(pieces.at(-1)?.dataset.t ?? 0), last: null };
  });
  const [first, last] = [...lanes].sort((a, b) => a.seconds - b.seconds), start = performance.now();
  const step = () => {
    const now = still.matches ? Infinity : (performance.now() - start) / 1000, isOver = now >= last.seconds;
    for (const lane of lanes) show(lane, now);
    first.section.classList.toggle("pard-first", now >= first.seconds);
    verdict.textContent = isOver ? ended : "Replayed side by side, each on its own clock …";
    banner.className = isOver ? kind : "pard-banner pard-note";
    again.hidden = !isOver;
    if (!isOver) return;
    clearInterval(element.replay);
    element.dataset.replaying = "over";
  };
  element.dataset.replaying = "now";
  element.replay = setInterval(step, 40);
  step();
}

watch("value", play);
element.addEventListener("click", (event) => event.target.closest(".pard-again") && play());
