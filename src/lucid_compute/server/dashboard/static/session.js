// The key, for as long as the tab is open, or on this device until one logs out: in storage, in no address and in no cookie.
const NAME = "lucid.key";
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
    sessionStorage.removeItem(NAME);
    localStorage.removeItem(NAME);
  } catch {
    // Nothing was kept.
  }
}
