// What the page does in the browser: keys, pasting and dropping, names for screen readers, what a reload brings back,
// the mask, and a word when the server is gone. It talks to this server alone.
window.mige = (() => {
  const BEAT = 5000; // ms between two looks whether the server is there
  const panel = () => [...document.querySelectorAll("[role=tabpanel]")].find((one) => one.checkVisibility());
  const button = (name) => [...(panel()?.querySelectorAll(name) ?? [])].find((one) => one.checkVisibility());

  // ---- kept by this browser ----
  const kept = (key) => {
    try { return JSON.parse(localStorage.getItem(`mige-${key}`)); } catch { return null; }
  };
  const keep = (key, value) => {
    try { localStorage.setItem(`mige-${key}`, JSON.stringify(value)); } catch { /* private windows keep nothing */ }
  };
  const seed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1e6;

  // ---- words for everybody, and for screen readers ----
  const say = (words) => {
    let line = document.querySelector(".mige-said");
    if (!line) {
      line = document.body.appendChild(document.createElement("div"));
      line.className = "mige-said";
      line.setAttribute("role", "status");
    }
    line.textContent = words;
    clearTimeout(say.timer);
    if (words) say.timer = setTimeout(() => say(""), 12000);
  };
  const name = () => {
    for (const slot of document.querySelectorAll(".mige-slot")) {
      const label = slot.querySelector("label, [data-testid=block-label]")?.textContent.trim() ?? "Picture";
      for (const one of slot.querySelectorAll("input[type=file], button:has(input[type=file]), [role=button]"))
        if (one.getAttribute("aria-label") !== `Upload ${label}`) one.setAttribute("aria-label", `Upload ${label}`);
      for (const one of slot.querySelectorAll("img")) if (!one.alt) one.alt = label;
      for (const one of slot.querySelectorAll("button[aria-label^=Remove]"))
        if (!one.getAttribute("aria-label").endsWith(label)) one.setAttribute("aria-label", `Remove ${label}`);
    }
    for (const one of document.querySelectorAll("td img:not([alt]), td img[alt='']")) one.alt = "Example picture";
    for (const stage of document.querySelectorAll(".block.mige-result:not([aria-live])")) {
      stage.setAttribute("aria-live", "polite");
      stage.setAttribute("aria-atomic", "true");
    }
    for (const part of document.querySelectorAll(".mige-gallery button img:not([alt]), .mige-gallery button img[alt='']"))
      part.alt = part.closest("button").textContent.trim() || "Result";
  };
  let due = 0;
  new MutationObserver(() => { due ||= requestAnimationFrame(() => { due = 0; name(); }); })
    .observe(document.documentElement, { childList: true, subtree: true });

  // ---- keys ----
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      button(".mige-run")?.click();
    }
    if (event.key === "Escape" && !document.fullscreenElement) button(".mige-stop")?.click();
  });

  // ---- images that are pasted or dropped ----
  const give = (input, file) => {
    const moved = new DataTransfer();
    moved.items.add(file);
    input.files = moved.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const place = (files, first) => {
    const free = [...(panel()?.querySelectorAll(".mige-slot") ?? [])]
      .filter((slot) => slot.checkVisibility() && !slot.querySelector("img") && slot.querySelector("input[type=file]"));
    if (first && free.includes(first)) free.unshift(...free.splice(free.indexOf(first), 1));
    files.slice(0, free.length).forEach((file, at) => give(free[at].querySelector("input[type=file]"), file));
    const left = files.length - free.length;
    if (left > 0) say(`${left} of ${files.length} ${files.length > 1 ? "files" : "file"} found no free place: take a picture away first.`);
  };
  const restoring = (button) => // Gradio puts the input beside the button
    (button.matches("input") ? button : button.querySelector("input[type=file]") ?? button.parentElement.querySelector("input[type=file]"));
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    event.stopPropagation();
    place(files);
  }, true);
  document.addEventListener("dragover", (event) => {
    if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    event.stopPropagation();
    const restore = event.target.closest?.(".mige-restore");
    if (restore) give(restoring(restore), files[0]);
    else place(files, event.target.closest?.(".mige-slot"));
  }, true);

  // ---- the result beside its input ----
  document.addEventListener("input", (event) => {
    if (event.target.matches(".mige-compare input"))
      event.target.closest(".mige-compare").style.setProperty("--at", `${event.target.value}%`);
  });

  // ---- whether the server is there ----
  let server = null;
  const lost = (words) => {
    let line = document.querySelector(".mige-lost");
    if (!words) { line?.remove(); return; }
    if (!line) {
      line = document.body.appendChild(document.createElement("div"));
      line.className = "mige-lost";
      line.setAttribute("role", "alert");
    }
    if (line.textContent !== words) line.textContent = words;
  };
  setInterval(async () => {
    if (document.visibilityState !== "visible") return;
    try {
      const answer = await fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(BEAT * 2) });
      const now = (await answer.json()).app_id;
      server ??= now;
      lost(now === server ? "" : "The server was started anew: reload the page. What you wrote is kept.");
    } catch {
      lost("The server does not answer: what ran is lost if it was stopped. This page looks again every few seconds.");
    }
  }, BEAT);

  // ---- the mask ----
  const mask = (element, props, watch) => {
    const part = (name) => element.querySelector(name);
    const mine = element.closest("[role=tabpanel]");
    let cursor = [0.5, 0.5], drawing = null, shown = "";
    const strokes = () => (Array.isArray(props.value) ? props.value : []);
    const paint = () => {
      const canvas = part("canvas");
      const pen = canvas.getContext("2d"), longer = Math.max(canvas.width, canvas.height);
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.lineCap = pen.lineJoin = "round";
      pen.strokeStyle = pen.fillStyle = "#0d9488";
      for (const [radius, ...parts] of [...strokes(), ...(drawing ? [drawing] : [])]) {
        pen.lineWidth = 2 * radius * longer;
        pen.beginPath();
        for (let at = 0; at < parts.length; at += 2) pen.lineTo(parts[at] * canvas.width, parts[at + 1] * canvas.height);
        if (parts.length === 2) pen.lineTo(parts[0] * canvas.width + 0.01, parts[1] * canvas.height);
        pen.stroke();
      }
      if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
        pen.lineWidth = 2;
        pen.strokeStyle = "#000";
        pen.beginPath();
        pen.arc(cursor[0] * canvas.width, cursor[1] * canvas.height, brush() * longer, 0, 7);
        pen.stroke();
      }
      part(".mige-mask-none").hidden = shown !== "";
      part(".mige-mask-area").hidden = shown === "";
      part("output").textContent = strokes().length ? "Only what is painted may change." : "";
    };
    const brush = () => Number(part("input").value) / 100;
    const set = (value) => { props.value = value; paint(); };
    const round = (value) => Math.round(Math.min(1, Math.max(0, value)) * 1e4) / 1e4;
    const at = (event) => {
      const box = part("canvas").getBoundingClientRect();
      return [round((event.clientX - box.left) / box.width), round((event.clientY - box.top) / box.height)];
    };
    element.addEventListener("pointerdown", (event) => {
      if (!event.target.matches("canvas")) return;
      event.preventDefault();
      event.target.setPointerCapture(event.pointerId);
      drawing = [brush(), ...at(event)];
      paint();
    });
    element.addEventListener("pointermove", (event) => {
      if (!drawing || drawing.length > 2000) return;
      const [x, y] = at(event), [lastX, lastY] = drawing.slice(-2);
      if (Math.hypot(x - lastX, y - lastY) > 0.005) { drawing.push(x, y); paint(); }
    });
    for (const kind of ["pointerup", "pointercancel"]) element.addEventListener(kind, () => {
      if (!drawing) return;
      const done = drawing;
      drawing = null;
      set([...strokes(), done]);
    });
    element.addEventListener("click", (event) => {
      const act = event.target.closest("button")?.dataset.do;
      if (act) set(act === "undo" ? strokes().slice(0, -1) : []);
    });
    element.addEventListener("keydown", (event) => {
      if (!event.target.matches("canvas")) return;
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!way && event.key !== " " && event.key !== "Backspace") return;
      event.preventDefault();
      if (way) { cursor = cursor.map((one, axis) => round(one + way[axis] * 0.02)); paint(); }
      else if (event.key === " ") set([...strokes(), [brush(), ...cursor]]);
      else set(strokes().slice(0, -1));
    });
    for (const kind of ["focusin", "focusout"]) element.addEventListener(kind, paint);
    const look = () => {
      const source = mine?.querySelector(".mige-slot img")?.src ?? "";
      if (source === shown) return;
      shown = source;
      const image = part("img");
      image.onload = () => {
        const scale = 1024 / Math.max(image.naturalWidth, image.naturalHeight), canvas = part("canvas");
        canvas.width = Math.round(image.naturalWidth * scale);
        canvas.height = Math.round(image.naturalHeight * scale);
        paint();
      };
      if (source) image.src = source;
      paint();
    };
    if (mine) new MutationObserver(look).observe(mine, { childList: true, subtree: true, attributeFilter: ["src"] });
    watch("value", paint);
    look();
    paint();
  };

  // ---- what a reload brings back ----
  const back = new Set(); // drafts that were restored: what is written before that would be overwritten
  const keepDraft = (key, values) => { if (back.has(key)) keep(key, values); };
  const draftIsBack = (key) => { back.add(key); };
  const tabs = () => [...document.querySelectorAll("[role=tab]")].filter((one) => one.checkVisibility());
  const keepTab = () => keep("tab", tabs().findIndex((one) => one.getAttribute("aria-selected") === "true"));
  const showTab = () => { const number = kept("tab"); if (number > 0) tabs()[number]?.click(); };

  return { kept, keep, seed, mask, say, keepDraft, draftIsBack, keepTab, showTab };
})();
