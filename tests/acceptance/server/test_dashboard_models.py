"""Models on the dashboard: registered, changed, ended; where their requests go, and which of them no node got."""

from __future__ import annotations

from typing import Any

from tests.browser import DESK, PHONE, Page
from tests.dashboard import A11Y, CONTRAST, Watched, axe_faults, press_button
from tests.lucid_serve import wait_until


def metadata_of(shared: Watched, name: str) -> dict[str, Any]:
    """Return what a model says of itself."""
    found: dict[str, Any] = shared.http.get(f"/models/{name}").json()["metadata"]
    return found


def test_a_model_is_registered_changed_and_changed_back(shared: Watched, page: Page) -> None:
    """By keyboard; a wrong value is refused at its field, and only what was changed is sent."""
    shared.add_model("other-model")
    shared.log_in(page, "/models?add=model")
    page.wait_for("document.activeElement.id === 'field-name'")
    page.type("new-model")
    page.fill("#field-minVramGb", "plenty")
    page.press("Enter")
    page.wait_for("document.querySelector('#field-minVramGb').ariaInvalid === 'true'")
    page.fill("#field-minVramGb", "fp16=140, q4=40")
    page.fill("#field-aliases", "the-new, newest")
    page.press("Enter")
    page.wait_for_text("new-model", "h1")
    assert metadata_of(shared, "the-new") == {
        "format": "safetensors",
        "minVramGb": {"fp16": 140.0, "q4": 40.0},
        "aliases": ["the-new", "newest"],
    }
    press_button(page, "Edit", ".actions")
    page.wait_for("document.querySelector('#field-minVramGb').value === 'q4=40, fp16=140'")
    assert page.run("document.querySelector('dialog [type=submit]').disabled")
    page.fill("#field-minVramGb", "q4=40")
    page.fill("#field-weights", "new-model=9, other-model=1")
    page.press("Enter")
    page.wait_for_text("The model was changed", ".actions")
    changed = metadata_of(shared, "new-model")
    assert (changed["minVramGb"], changed["aliases"]) == ({"q4": 40.0}, ["the-new", "newest"])
    assert changed["route"] == {"weights": {"new-model": 9, "other-model": 1}}
    page.wait_for_text("weight 9", "[aria-label='Where its requests go']")
    page.wait_for_text("weight 1", "[aria-label='Where its requests go']")
    assert axe_faults(page) == []
    press_button(page, "Undo", ".actions")
    page.wait_for("!document.querySelector('.undo')")
    restored = metadata_of(shared, "new-model")
    assert restored["minVramGb"] == {"fp16": 140.0, "q4": 40.0}
    assert "route" not in restored
    page.wait_for("!document.querySelector(\"[aria-label='Where its requests go']\")")


def test_a_model_is_ended_by_its_name(shared: Watched, page: Page) -> None:
    shared.add_model("short-lived")
    shared.log_in(page, "/models/short-lived")
    press_button(page, "Revoke", ".actions")
    page.wait_for("document.activeElement.id === 'field-word'")
    assert page.run("document.querySelector('dialog .danger').disabled")
    page.type("short-lived")
    page.press("Enter")
    page.wait_for_text("Models", "h1")
    assert shared.http.get("/models/short-lived").status_code == 404


def test_a_key_that_may_only_read_registers_and_changes_no_model(shared: Watched, page: Page) -> None:
    """In the service's words, in the dialog."""
    shared.add_model("not-mine")
    shared.log_in(page, "/models?add=model", key=shared.new_key("passports:read"))
    page.wait_for("document.activeElement.id === 'field-name'")
    page.type("mine")
    page.press("Enter")
    page.wait_for_text("This key lacks the scope", "dialog [role=alert]")
    page.go(f"{shared.url}/models/not-mine?do=edit")
    page.fill("#field-aliases", "mine")
    page.press("Enter")
    page.wait_for_text("This key lacks the scope", "dialog [role=alert]")
    assert "aliases" not in metadata_of(shared, "not-mine")


def test_a_models_page_says_which_requests_no_node_got(shared: Watched, page: Page) -> None:
    """By cause; of this model alone."""
    for name, requests in (("wanted", 2), ("also-wanted", 1)):
        shared.add_model(name)
        for _ in range(requests):
            body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
            assert shared.http.post("/v1/chat/completions", json=body).status_code == 503

    def is_counted() -> bool:
        losses = shared.http.get("/payouts/losses", params={"model": "wanted"}).json()["losses"]
        return bool(sum(loss["refused"] for loss in losses) == 2)

    wait_until(is_counted, 30)
    shared.log_in(page, "/models/wanted")
    row = "document.querySelector(\"[aria-label='Unmet demand'] tbody tr\")"
    page.wait_for(f"Boolean({row})")
    cells = page.run(f"{row}.innerText").split("\t")
    assert [cell.strip() for cell in cells][:2] == ["no node serves it", "2"]


def test_the_models_dialogs_are_legible_and_named(shared: Watched, page: Page) -> None:
    """On a phone in the dark and on a desk in the light."""
    page.prefer("dark")
    page.resize(PHONE)
    shared.log_in(page, "/models?add=model")
    page.wait_for("document.activeElement.id === 'field-name'")
    assert page.run("document.documentElement.scrollWidth") <= PHONE.width
    for scheme, size in (("dark", PHONE), ("light", DESK)):
        page.prefer(scheme)
        page.resize(size)
        page.wait_for(f"document.documentElement.dataset.theme === {scheme!r}")
        assert page.run(CONTRAST) >= 4.5
        assert page.run(A11Y) == []
        assert axe_faults(page) == []
