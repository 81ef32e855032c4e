// The key, for as long as the tab is open, or on this device until one logs out: in storage, in no address and in no cookie.
const NAME = "lucid.key";
const NARROW = "lucid.narrow";
let inMemory = null;

export function readKey() {
  try {
    return sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? inMemory;
  } catch {
    return inMemory;
  }
}

export function keepKey(key, isForDevice = false) {
  inMemory = key;
  try {
    sessionStorage.setItem(NAME, key);
    if (isForDevice) localStorage.setItem(NAME, key);
  } catch {
    // Storage may be switched off: then the key lasts until the page is loaded anew.
  }
}

export function forgetKey() {
  inMemory = null;
  delete window.lucidEarly;
  try {
    sessionStorage.clear(); // with what was found with this key
    localStorage.removeItem(NAME);
  } catch {
    // Nothing was kept.
  }
}

// Keep in the tab whether the key may read nodes: `early.js` asks for nothing that it would be refused.
export function keepWhetherItReads(mayRead) {
  try {
    if (mayRead) sessionStorage.removeItem(NARROW);
    else sessionStorage.setItem(NARROW, "1");
  } catch {
    // Then it is asked for too much, and refused.
  }
}
