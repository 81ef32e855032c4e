// The key, for as long as the tab is open: in its session storage, in no address and in no cookie.
const NAME = "lucid.key";
let inMemory = null;

export function readKey() {
  try {
    return sessionStorage.getItem(NAME) ?? inMemory;
  } catch {
    return inMemory;
  }
}

export function keepKey(key) {
  inMemory = key;
  try {
    sessionStorage.setItem(NAME, key);
  } catch {
    // Storage may be switched off: then the key lasts until the page is loaded anew.
  }
}

export function forgetKey() {
  inMemory = null;
  delete window.lucidEarly;
  try {
    sessionStorage.removeItem(NAME);
  } catch {
    // Nothing was kept.
  }
}
