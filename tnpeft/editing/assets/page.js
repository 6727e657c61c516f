// What the page adds to the editor: completion and sentences on hover, asked of the server beside the page;
// clicks on mistakes; dark and light.
import * as CM from "nicegui-codemirror";

const base = new URL(".", import.meta.url).pathname.replace(/assets\/$/, "");

async function ask(what, text, line, column) {
  const body = JSON.stringify({ text, line, column });
  const answer = await fetch(base + what, { method: "POST", body, headers: { "Content-Type": "application/json" } });
  return answer.ok ? answer.json() : null;
}

async function completions(context) {
  const line = context.state.doc.lineAt(context.pos);
  const head = line.text.slice(0, context.pos - line.from);
  if (!context.explicit && !/[A-Za-z_:{,\s]$/.test(head)) return null;
  const found = await ask("complete", context.state.doc.toString(), line.number, context.pos - line.from + 1);
  if (!found || !found.items.length || context.aborted) return null;
  if (!context.explicit && !/[A-Za-z0-9_.]$/.test(head) && found.items[0].kind === "key" && !head.trim()) return null;
  const types = { key: "property", value: "constant", name: "variable", snippet: "text" };
  const options = found.items.map((item) => ({ ...item, type: types[item.kind] || "text" }));
  return { from: line.from + found.start, options, validFor: /^[A-Za-z0-9_.]*$/ };
}

async function sentence(view, pos) {
  const line = view.state.doc.lineAt(pos);
  const found = await ask("hover", view.state.doc.toString(), line.number, pos - line.from + 1);
  if (!found) return null;
  return {
    pos: line.from + found.start - 1,
    end: line.from + found.end - 1,
    create() {
      const dom = document.createElement("div");
      dom.className = "tn-hover";
      dom.textContent = found.text;
      return { dom };
    },
  };
}

function setTheme(component) {
  component.setTheme(document.body.classList.contains("body--dark") ? "vscodeDark" : "basicLight");
}

function goTo(view, item) {
  const number = Math.min(Number(item.dataset.line), view.state.doc.lines);
  if (number < 1) return;
  const line = view.state.doc.line(number);
  const at = Math.min(line.from + Number(item.dataset.column) - 1, line.to);
  view.dispatch({ selection: { anchor: at }, scrollIntoView: true });
  view.focus();
}

function start(id) {
  const component = getElement(id);
  if (!component || !component.editor) {
    setTimeout(() => start(id), 30);
    return;
  }
  const view = component.editor;
  view.dispatch({
    effects: CM.StateEffect.appendConfig.of([
      CM.EditorState.languageData.of(() => [{ autocomplete: completions }]),
      CM.hoverTooltip(sentence),
    ]),
  });
  view.contentDOM.setAttribute("aria-label", "YAML of the spec");
  setTheme(component);
  new MutationObserver(() => setTheme(component)).observe(document.body, { attributeFilter: ["class"] });
  for (const kind of ["click", "keydown"]) {
    document.addEventListener(kind, (event) => {
      const item = event.target.closest?.(".tn-mistakes li[data-line]");
      if (item && (kind === "click" || event.key === "Enter")) goTo(view, item);
    });
  }
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
      event.preventDefault();
      document.querySelector(".tn-save")?.click();
    }
  });
  document.body.dataset.ready = "true";
}

window.tnDark = () => Quasar.Dark.set(!Quasar.Dark.isActive);
window.tnStart = start;
if (window.tnEditor !== undefined) start(window.tnEditor);
