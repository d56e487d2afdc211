// What Lambda Solvers shows on nodes: a panel with the model evaluations, the schedule in lambda, warnings, and how the
// sampler's calibration stands. Every number and every line comes from Python (nodes/status/panel.py); here is how the nodes
// around a sampler are read, and where the answer is put.
import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"

const pack = await about()
const NAME = "lambda_solvers_panel"
const COLOURS = { count: "inherit", note: "var(--descrip-text, #999)", good: "#5c8", warn: "#fa5" }
// Links of these types say nothing of a schedule, so what is behind them is left alone.
const BESIDE = new Set(["CONDITIONING", "LATENT", "IMAGE", "MASK", "VAE", "CLIP", "NOISE", "CONTROL_NET"])
const [MUTED, BYPASSED, SUBGRAPH_INPUT] = [2, 4, -10]
const [TALL, LOW, CURVE] = [170, 78, 92] // the least height of a panel with a curve, and without; of a curve alone
const panels = new WeakMap() // node -> its panel
const opened = new WeakMap() // subgraph -> the node that it was last opened from
let plots = true // the setting

// --- what may fail without ComfyUI's interface noticing ---

// What the server says of the pack, or null: then there are no panels, and everything else is as it was.
async function about() {
  try {
    const response = await api.fetchApi("/lambda_solvers/pack", { signal: AbortSignal.timeout(10_000) })
    if (!response.ok) throw new Error(`the server answers ${response.status}`)
    const said = await response.json()
    for (const key of ["nodes", "hosts", "names", "settings"])
      if (!Array.isArray(said?.[key])) throw new Error(`the server's answer has no ${key}`)
    return said
  } catch (fault) {
    console.warn("Lambda Solvers: no panels on nodes, as /lambda_solvers/pack cannot be read:", fault)
    return null
  }
}

// A function of ours that ComfyUI's interface calls: a fault in it is told, the first time, and goes no further.
const told = new Set()
function safely(act) {
  return (...args) => {
    try {
      return act(...args)
    } catch (fault) {
      if (!told.has(String(fault))) console.warn("Lambda Solvers: a panel failed:", fault)
      told.add(String(fault))
    }
  }
}

// --- reading the graph ---

// Every use of a node, by the id it has in a run ("7", or "4:1" inside subgraph node 4): {node, id, host}, host the use of the
// subgraph node it is in. Where a subgraph is used twice, its nodes have two.
function places() {
  const found = new Map()
  const enter = (graph, host) => {
    for (const node of graph?.nodes ?? []) {
      const place = { node, id: within(host, node), host }
      found.set(place.id, place)
      if (node.subgraph) enter(node.subgraph, place)
    }
  }
  enter(app.graph, null)
  return found
}

const within = (host, node) => (host ? `${host.id}:` : "") + node.id
const isOpen = ({ node, host }) => !host || opened.get(node.graph) === host.node && isOpen(host)
const nodes = () => new Set([...places().values()].map(({ node }) => node))

// The use of a node that is on screen, or was last, or else the first.
function use(node, where) {
  const all = [...where.values()].filter((place) => place.node === node)
  return all.find(isOpen) ?? all[0]
}

// What the input of a node is set to: by its widget, or where it is linked (a promoted widget is) by what comes.
function chosen(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1
  if (slot >= 0 && node.isInputConnected(slot)) { // or else the graph need not be read
    const where = places()
    const place = use(node, where)
    if (place) return origin(place, slot, where)?.value
  }
  return node.widgets?.find((widget) => widget.name === name)?.value
}

// What an input's link comes from: {place, slot}, {value} where it is a value after all, or null if that is not to be told.
function origin({ node, host }, slot, where, depth = 0) {
  const link = inputLink(node, slot)
  return link && depth < 50 ? from(link, node.graph, host, where, depth) : null
}

// getInputLink of a subgraph node is about what is inside of it.
function inputLink(node, slot) {
  if (!node.subgraph) return node.getInputLink(slot)
  return [...node.graph.links.values()].find(
    (link) => String(link.target_id) === String(node.id) && Number(link.target_slot) === slot)
}

function from(link, graph, host, where, depth) {
  if (Number(link.origin_id) === SUBGRAPH_INPUT) {
    const slot = host?.node.inputs[link.origin_slot]
    if (!slot) return null
    if (host.node.isInputConnected(link.origin_slot)) return origin(host, link.origin_slot, where, depth + 1)
    const widget = host.node.widgets?.find((w) => w.name === (slot.widget?.name ?? slot.name))
    return widget ? { value: widget.value } : null
  }
  const node = graph.getNodeById(link.origin_id)
  if (!node || node.mode === MUTED) return null
  const place = where.get(within(host, node))
  if (node.type === "PrimitiveNode") return { value: node.widgets?.[0]?.value }
  if (node.type === "Reroute") return origin(place, 0, where, depth + 1)
  if (node.mode === BYPASSED) {
    const through = node.inputs.findIndex((input) => input.type === node.outputs[link.origin_slot].type)
    return through < 0 ? null : origin(place, through, where, depth + 1)
  }
  if (node.subgraph) {
    const inner = node.subgraph.outputNode.slots[link.origin_slot]?.getLinks()[0]
    return inner ? from(inner, node.subgraph, place, where, depth + 1) : null
  }
  return node.isVirtualNode ? null : { place, slot: link.origin_slot }
}

// The nodes that take a node's sampler, and those that take it from them (Sampler Options wraps a sampler).
function users(start, where) {
  const direct = [...where.values()].filter((place) => {
    const { node } = place
    return node.mode !== MUTED && node.mode !== BYPASSED && node.inputs?.some((input, slot) =>
      input.name === "sampler" && node.isInputConnected(slot) && origin(place, slot, where)?.place === start)
  })
  return direct.flatMap((place) => [place, ...users(place, where)])
}

// The nodes that say what the sampler at `start` will do, in ComfyUI's API form.
function around(start, where) {
  const graph = {}
  const todo = [start, ...users(start, where)]
  while (todo.length) {
    const place = todo.pop()
    const { node, id } = place
    if (graph[id]) continue
    const inputs = {}
    for (const [slot, input] of (node.inputs ?? []).entries()) {
      if (!node.isInputConnected(slot)) continue
      const comes = origin(place, slot, where)
      if (comes && "value" in comes) inputs[input.name] = comes.value
      else inputs[input.name] = comes ? [comes.place.id, Number(comes.slot)] : ["?", 0]
      if (comes?.place && !BESIDE.has(input.type)) todo.push(comes.place)
    }
    for (const { name, value, options } of node.widgets ?? [])
      if (!(name in inputs) && options?.serialize !== false && ["string", "number", "boolean"].includes(typeof value))
        inputs[name] = value
    graph[id] = { class_type: node.comfyClass, inputs }
  }
  return { node: start.id, graph }
}

// --- the panel ---

function element() {
  const el = document.createElement("div")
  el.className = "lambda-solvers-panel"
  // Clicks and the wheel go to the canvas below.
  el.style.cssText = "display:flex;flex-direction:column;box-sizing:border-box;width:100%;height:100%;" +
    "pointer-events:none;overflow:hidden;border-radius:6px;padding:4px 6px;gap:3px;font:11px/14px sans-serif;" +
    "color:var(--fg-color, #ddd);background:#0003"
  // One unit square stretched over the place there is; strokes keep their width.
  el.innerHTML = `<svg viewBox="0 0 1 1" preserveAspectRatio="none" overflow="visible" fill="none" stroke-linecap="round"
      style="display:none;width:calc(100% - 8px);margin:4px;flex:1 1 70px;min-height:0">
    <path class="line" stroke="#4af" stroke-width="1.5" vector-effect="non-scaling-stroke"/>
    <path class="points" stroke="#fb4" stroke-width="5" vector-effect="non-scaling-stroke"/></svg><div class="lines"></div>`
  return el
}

function open(node, plot) {
  const el = element()
  const widget = node.addDOMWidget(NAME, "LAMBDA_SOLVERS_PANEL", el, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue: () => {},
    getMinHeight: () => widget.hidden ? 0 : panel.height, getMaxHeight: () => widget.hidden ? 0 : 2 * panel.height,
  })
  widget.hidden = false
  widget.serialize = false // neither in the saved workflow (it is the last widget) nor in the prompt
  const panel = { node, el, widget, plot, answer: { lines: [], curve: null }, error: null, runs: null, asked: null, grown: 0 }
  panels.set(node, panel)
  fit(panel)
  new ResizeObserver(safely(() => fit(panel))).observe(el.querySelector(".lines"))
  return panel
}

// As high as its lines and its curve need; the node grows with it, and shrinks again by what it grew.
function fit(panel) {
  const { node, el, widget, plot } = panel
  const curve = el.querySelector("svg").style.display !== "none"
  const height = Math.max(plot ? TALL : LOW, el.querySelector(".lines").offsetHeight + 8 + (curve ? CURVE : 0))
  if (widget.hidden || height === panel.height) return
  panel.height = height
  // In CSS too: Nodes 2.0 of frontend 1.32 asks nobody else.
  Object.assign(el.style, { minHeight: `${height}px`, maxHeight: `${2 * height}px` })
  const before = node.size[1] - panel.grown
  const now = Math.max(before, node.computeSize()[1])
  panel.grown = now - before
  node.setSize([node.size[0], now])
}

// A panel is put away, not removed: Nodes 2.0 of frontend 1.32 shows only the widgets that a node was loaded with.
function show(panel, visible) {
  const { node, el, widget } = panel
  if (widget.hidden !== visible) return
  const height = el.offsetHeight
  panel.grown = 0
  widget.hidden = !visible
  el.style.display = visible ? "flex" : "none"
  node.setSize([node.size[0], Math.max(node.computeSize()[1], visible ? node.size[1] : node.size[1] - height)])
}

function paint(panel) {
  const { lines, curve } = panel.answer
  const shown = panel.error // which a line may have foreseen
    ? [{ kind: "warn", text: panel.error }, ...lines.filter(({ text }) => !text.includes(panel.error))] : lines
  panel.el.querySelector(".lines").replaceChildren(...shown.map(({ kind, text }) => {
    const line = document.createElement("div")
    line.className = kind
    line.style.color = COLOURS[kind]
    line.textContent = text
    return line
  }))
  const visible = panel.plot && plots && curve?.line.length > 1
  panel.el.querySelector("svg").style.display = visible ? "" : "none"
  fit(panel)
  if (!visible) return
  panel.el.querySelector(".line").setAttribute("d", "M" + curve.line.map((at) => at.join(" ")).join("L"))
  panel.el.querySelector(".points").setAttribute("d", curve.points.map((at) => `M${at.join(" ")}h0`).join(""))
}

// Python's answer; a line that says so where there is none.
async function asked(body) {
  try {
    const response = await api.fetchApi("/lambda_solvers/panel", { method: "POST", body })
    const answer = await response.json()
    if (Array.isArray(answer.lines)) return answer
    throw new Error(answer.error)
  } catch (fault) {
    return { lines: [{ kind: "warn", text: `warning: the server has no answer: ${fault.message}` }], curve: null }
  }
}

// Ask Python again if anything that it is told has changed.
function refresh(panel) {
  if (!panel || panel.widget.hidden || !samples(panel.node)) return
  const where = places()
  const place = use(panel.node, where)
  if (!place) return
  const body = JSON.stringify({ ...around(place, where), locale: app.extensionManager.setting.get("Comfy.Locale") ?? "en" })
  if (panel.asked === body) return
  panel.asked = body
  clearTimeout(panel.timer)
  panel.timer = setTimeout(async () => {
    const answer = await asked(body)
    if (panel.asked !== body) return
    panel.answer = answer
    panel.runs = answer.runs
    safely(paint)(panel)
  }, 60)
}

// --- which nodes have one ---

const ours = (node) => node.constructor.nodeData?.python_module === pack.module
const sampler = (node) => pack.nodes.includes(node.comfyClass)
const host = (node) => pack.hosts.includes(node.comfyClass) // ComfyUI's own, which may name a sampler of ours
const samples = (node) => sampler(node) || host(node) && pack.names.includes(chosen(node, "sampler_name"))

function look(node) {
  const panel = panels.get(node) ?? (samples(node) ? open(node, sampler(node)) : null)
  if (!panel) return
  show(panel, samples(node) || panel.error !== null)
  refresh(panel)
}

function* all() {
  for (const node of nodes()) if (panels.has(node)) yield panels.get(node)
}

function repaint(value) {
  plots = value
  if (app.graph) for (const panel of all()) paint(panel)
}

function askAgain() {
  if (!app.graph) return
  for (const panel of all()) {
    panel.asked = null
    refresh(panel)
  }
}

// Nodes 2.0 makes nodes anew on undo, under the same ids, and keeps the old ones' elements on screen: put ours there.
function adopt(node) {
  const el = panels.get(node)?.el
  if (!el || el.isConnected || node.graph !== app.canvas?.graph) return
  const old = document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"] .lambda-solvers-panel`)
  if (old) old.replaceWith(el)
}

function chain(object, key, then) {
  const before = object[key]
  object[key] = function (...args) {
    const result = before?.apply(this, args)
    safely(then)(...args)
    return result
  }
}

if (pack) app.registerExtension({
  name: "lambdasolvers.panel",
  settings: pack.settings.map((setting) => ({
    ...setting, onChange: setting.id === pack.plot ? safely(repaint) : () => setTimeout(safely(askAgain), 500), // once it is stored
  })),

  nodeCreated: safely((node) => {
    if (ours(node)) chain(node, "onSerialize", (saved) => {
      saved.properties = { ...saved.properties, cnr_id: pack.cnr_id, ver: pack.ver }
    })
    if (!sampler(node) && !host(node)) return
    look(node)
    for (const widget of node.widgets) chain(widget, "callback", () => look(node))
    chain(node, "onConnectionsChange", () => queueMicrotask(safely(() => look(node))))
    chain(node, "onConfigure", () => { // loading, undo, paste
      look(node)
      for (const wait of [0, 50, 400]) setTimeout(safely(() => adopt(node)), wait)
    })
  }),

  setup() {
    const again = safely(() => { for (const node of nodes()) if (sampler(node) || host(node)) look(node) })
    api.addEventListener("graphChanged", again)
    app.canvas.canvas.addEventListener("subgraph-opened", safely(({ detail }) => {
      opened.set(detail.subgraph, detail.fromNode)
      again()
    }))
    let soon // the graph is said to have changed long after some edits of neighbours
    for (const event of ["change", "keyup", "pointerup"]) window.addEventListener(event, () => {
      clearTimeout(soon)
      soon = setTimeout(again, 100)
    }, true)
    api.addEventListener("lambda_solvers.run", safely(askAgain))
    api.addEventListener("execution_start", safely(() => {
      for (const panel of all()) {
        if (!panel.error) continue
        panel.error = null
        paint(panel)
        show(panel, samples(panel.node))
      }
    }))
    // Newer interfaces hide an error's text: it is shown on the node, or on the sampler of the node that samples.
    api.addEventListener("execution_error", safely(({ detail }) => {
      for (const { node, id } of places().values()) {
        if (id !== String(detail.node_id) && panels.get(node)?.runs !== String(detail.node_id)) continue
        const panel = panels.get(node) ?? (ours(node) ? open(node, false) : null)
        if (!panel) continue
        panel.error = detail.exception_message.trim()
        paint(panel)
        show(panel, true)
      }
    }))
  },
})
