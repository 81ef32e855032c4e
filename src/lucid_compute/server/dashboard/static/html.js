// The page's own library: tagged templates, elements that are matched by key, and components with hooks.
//
//     const Counter = ({ from }) => {
//       const [count, setCount] = useState(from);
//       return html`<button onClick=${() => setCount(count + 1)}>${count}</button>`;
//     };
//     render(html`<${Counter} from=${3} />`, document.body);
//
// Properties of an element are attributes, except `on…` (a listener), `style` (an object), `ref`, and `value` and
// `checked` of fields. Null, false and undefined are left out. No markup is ever made of text.
const HOLE = "\u0000";
const SVG = "http://www.w3.org/2000/svg";
const TOKEN = /<\/[^>]*>|<[^\s/>]+(?:"[^"]*"|'[^']*'|[^>"'])*>|[^<]+/g;
const ATTRIBUTE = /\.\.\.\u0000|([^\s=]+)(?:=(?:"([^"]*)"|'([^']*)'|(\S+)))?/g;
const FIELDS = new Set(["INPUT", "SELECT", "TEXTAREA"]);
const SPOKEN = /^(aria-|data-)|^(spellcheck|draggable)$/; // here false is a value
const templates = new WeakMap();

// Templates

export function html(strings, ...values) {
  let template = templates.get(strings);
  if (!template) templates.set(strings, (template = parse(strings.join(HOLE))));
  return soleOf(build(template, values));
}

export const Fragment = ({ children }) => children;

// Return the roots of a template: texts, numbers of holes, and elements [tag, attributes, children].
function parse(source) {
  const open = [[null, [], []]];
  let hole = 0;
  for (const [token] of source.matchAll(TOKEN)) {
    const [, , kids] = open.at(-1);
    if (token.startsWith("</")) {
      if (token.includes(HOLE)) hole += 1;
      open.pop();
    } else if (token.startsWith("<")) {
      const isSole = token.endsWith("/>");
      const inner = token.slice(1, isSole ? -2 : -1);
      const [name] = inner.match(/^\S+/);
      const element = [name === HOLE ? hole++ : name, [], []];
      for (const [whole, attribute, ...texts] of inner.slice(name.length).matchAll(ATTRIBUTE)) {
        if (!attribute) element[1].push([null, hole++]);
        else element[1].push([attribute, partsOf(texts.find((text) => text !== undefined), () => hole++, whole.includes("="))]);
      }
      kids.push(element);
      if (!isSole) open.push(element);
    } else {
      token.split(HOLE).forEach((text, place) => {
        if (place > 0) kids.push(hole++);
        const trimmed = text.replace(/^\s*\n\s*|\s*\n\s*$/g, "");
        if (trimmed) kids.push(trimmed);
      });
    }
  }
  if (open.length !== 1) throw new SyntaxError(`An element is not closed in: ${source.replaceAll(HOLE, "${…}")}`);
  return open[0][2];
}

// Return what an attribute is made of: true, a text, the number of a hole, or a list of texts and holes.
function partsOf(text, nextHole, isGiven) {
  if (!isGiven) return true;
  if (text === HOLE) return nextHole();
  const texts = text.split(HOLE);
  return texts.length === 1 ? text : texts.flatMap((part, place) => (place ? [nextHole(), part] : [part]));
}

function build(kids, values) {
  return kids.map((kid) => {
    if (typeof kid === "number") return values[kid];
    if (typeof kid === "string") return kid;
    const [tag, attributes, inner] = kid;
    const props = {};
    for (const [name, parts] of attributes) {
      if (name === null) Object.assign(props, values[parts]);
      else if (Array.isArray(parts)) props[name] = parts.map((part) => (typeof part === "number" ? values[part] : part)).join("");
      else props[name] = typeof parts === "number" ? values[parts] : parts;
    }
    if (inner.length > 0) props.children = soleOf(build(inner, values));
    const { key, ...rest } = props;
    return { type: typeof tag === "number" ? values[tag] : tag, key, props: rest };
  });
}

const soleOf = (list) => (list.length === 1 ? list[0] : list);

// Elements

export function render(content, container) {
  const root = { kids: [], dom: container, depth: 0, isAlive: true };
  container.replaceChildren();
  root.kids = matchKids(root, container, [], [normal(content)], null);
  runEffects();
}

// Text is a string, what is empty is null, and a list is a fragment with keys of its own.
function normal(content) {
  if (content === null || content === undefined || typeof content === "boolean") return null;
  if (Array.isArray(content)) return { type: Fragment, key: undefined, props: { children: content } };
  return typeof content === "object" ? content : String(content);
}

const normalKids = (children) => (Array.isArray(children) ? children : [children]).map(normal);
const keyOf = (content) => content?.key ?? undefined;
const isSameKind = (one, other) => one?.type === other?.type && keyOf(one) === keyOf(other) && typeof one === typeof other && (one === null) === (other === null);

// Match children with those before: by key, else by place. Return the instances, whose elements are in order and in place.
function matchKids(parent, into, before, contents, end) {
  const keyed = new Map(before.filter(({ content }) => keyOf(content) !== undefined).map((one) => [one.content.key, one]));
  const left = new Set(before);
  const kids = contents.map((content, place) => {
    const key = keyOf(content);
    const match = key === undefined ? before[place] : keyed.get(key);
    if (!match || !left.has(match) || !isSameKind(match.content, content)) return mount(content, parent, into);
    left.delete(match);
    update(match, content);
    return match;
  });
  left.forEach((one) => unmount(one, true));
  for (const one of kids.toReversed()) for (const element of elementsOf(one).toReversed()) {
    if (element.nextSibling !== end || element.parentNode !== into) into.insertBefore(element, end);
    end = element;
  }
  return kids;
}

function mount(content, parent, into) {
  const one = { content, parent, into, depth: parent.depth + 1, kids: [], dom: null, hooks: [], isAlive: true, listeners: {} };
  if (content === null) return one;
  if (typeof content === "string") {
    one.dom = document.createTextNode(content);
  } else if (typeof content.type === "function") {
    one.kids = matchKids(one, document.createDocumentFragment(), [], rendered(one), null);
    adopt(one, into);
    effects.push(one);
  } else {
    const isSvg = content.type === "svg" || (into.namespaceURI === SVG && into.localName !== "foreignObject");
    one.dom = isSvg ? document.createElementNS(SVG, content.type) : document.createElement(content.type);
    one.kids = matchKids(one, one.dom, [], normalKids(content.props.children), null);
    setProps(one, {}, content.props);
  }
  return one;
}

// Components are put together apart from the page; from then on their elements belong in `into`.
function adopt(one, into) {
  for (const kid of one.kids) {
    kid.into = into;
    if (!kid.dom) adopt(kid, into);
  }
}

function update(one, content) {
  const former = one.content;
  if (former === content) return;
  one.content = content;
  if (typeof content === "string") {
    one.dom.data = content;
  } else if (typeof content.type === "function") {
    renderAgain(one);
  } else {
    one.kids = matchKids(one, one.dom, one.kids, normalKids(content.props.children), null);
    setProps(one, former.props, content.props);
  }
}

function unmount(one, isRoot) {
  one.isAlive = false;
  one.hooks.forEach(cleanUp);
  setRef(one.content?.props?.ref, null);
  one.kids.forEach((kid) => unmount(kid, isRoot && !one.dom));
  if (isRoot) one.dom?.remove();
}

const elementsOf = (one) => (one.dom ? [one.dom] : one.kids.flatMap(elementsOf));

// Return the element that follows on a component's own; null at the end of its parent.
function elementAfter(one) {
  const { parent } = one;
  for (const next of parent.kids.slice(parent.kids.indexOf(one) + 1)) {
    const [element] = elementsOf(next);
    if (element) return element;
  }
  return parent.dom ? null : elementAfter(parent);
}

function setProps(one, former, props) {
  const { dom, listeners } = one;
  for (const name of Object.keys({ ...former, ...props })) {
    const value = props[name];
    if (name === "children" || (value === former[name] && name !== "value" && name !== "checked")) continue;
    if (name === "ref") {
      setRef(former.ref, null);
      setRef(value, dom);
    } else if (name.startsWith("on")) {
      const type = name.slice(2).toLowerCase();
      if (!(type in listeners)) dom.addEventListener(type, (event) => listeners[type]?.(event));
      listeners[type] = value;
    } else if (name === "style") {
      Object.assign(dom.style, Object.fromEntries(Object.keys(former.style ?? {}).map((each) => [each, ""])), value);
    } else if (name === "checked" || (name === "value" && FIELDS.has(dom.tagName))) {
      const wanted = name === "checked" ? Boolean(value) : String(value ?? "");
      if (name in props && dom[name] !== wanted) dom[name] = wanted;
    } else if (value === null || value === undefined || (value === false && !SPOKEN.test(name))) {
      dom.removeAttribute(name);
    } else {
      dom.setAttribute(name, value === true && !SPOKEN.test(name) ? "" : value);
    }
  }
}

function setRef(ref, element) {
  if (typeof ref === "function") ref(element);
  else if (ref) ref.current = element;
}

// Components and hooks

const waiting = new Set();
const effects = [];
let current = null;
let place = 0;
let isQueued = false;

// Return what a component shows. One that fails shows what it showed before, and the rest of the page goes on.
function rendered(one) {
  [current, place] = [one, 0];
  waiting.delete(one);
  try {
    return normalKids(one.content.type(one.content.props));
  } catch (error) {
    reportError(error);
    return one.kids.length > 0 ? one.kids.map(({ content }) => content) : [null];
  } finally {
    current = null;
  }
}

function renderAgain(one) {
  one.kids = matchKids(one, one.into, one.kids, rendered(one), elementAfter(one));
  effects.push(one);
}

// Draw what has changed, outermost first. What had the focus keeps it, also when its element was moved.
function flush() {
  const focused = document.activeElement;
  isQueued = false;
  for (const one of [...waiting].sort((each, other) => each.depth - other.depth)) {
    if (waiting.delete(one) && one.isAlive) renderAgain(one);
  }
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  runEffects();
}

function runEffects() {
  for (const one of effects.splice(0)) {
    for (const hook of one.hooks) {
      if (!hook.isDue || !one.isAlive) continue;
      hook.isDue = false;
      cleanUp(hook);
      hook.cleanUp = attempt(hook.run);
    }
  }
}

function cleanUp(hook) {
  if (typeof hook.cleanUp === "function") attempt(hook.cleanUp);
  hook.cleanUp = undefined;
}

// Call what a view gave. Its fault is reported, and stops nothing else.
function attempt(run) {
  try {
    return run();
  } catch (error) {
    reportError(error);
    return undefined;
  }
}

function useHook(make) {
  const { hooks } = current;
  if (place === hooks.length) hooks.push(make(current));
  return hooks[place++];
}

export function useState(initial) {
  const hook = useHook((one) => {
    const made = { value: typeof initial === "function" ? initial() : initial };
    made.set = (next) => {
      const value = typeof next === "function" ? next(made.value) : next;
      if (Object.is(value, made.value) || !one.isAlive) return;
      made.value = value;
      if (!isQueued) queueMicrotask(flush);
      isQueued = true;
      waiting.add(one);
    };
    return made;
  });
  return [hook.value, hook.set];
}

export const useRef = (initial) => useHook(() => ({ current: initial }));

const isChanged = (former, about) => !former || !about || about.length !== former.length || about.some((value, each) => !Object.is(value, former[each]));

// Return what `make` returned when one of `about` changed last.
export function useMemo(make, about) {
  const hook = useHook(() => ({}));
  if (isChanged(hook.about, about)) [hook.value, hook.about] = [make(), about];
  return hook.value;
}

// Call `run` after the page was drawn, when one of `about` has changed; what it returns is called before the next and at the end.
export function useEffect(run, about) {
  const hook = useHook(() => ({ isDue: false }));
  if (!isChanged(hook.about, about)) return;
  Object.assign(hook, { run, about, isDue: true });
}
