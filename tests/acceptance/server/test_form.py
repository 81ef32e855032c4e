"""The service says in which form it runs, and a process of these tests runs in the form that is tested."""

from __future__ import annotations

from lucid_compute import __version__, compilation
from lucid_compute.gateway import attempt
from tests import FORM
from tests.lucid_serve import serving
from tests.prometheus import value_of

IS_COMPILED = FORM["LUCID_COMPILED"] == "true"


async def test_a_service_that_is_tested_has_the_form_that_is_tested(database_url: str) -> None:
    """Its metrics, its readiness and its banner say so; nothing that a test starts is of the other form unnoticed."""
    with serving(database_url) as served:
        async with served.client() as admin:
            metrics = (await admin.get("/metrics")).text
            ready = (await admin.get("/readyz")).json()
        labels = f'compiled="{str(IS_COMPILED).lower()}",python="{compilation.PYTHON}",version="{__version__}"'
        assert value_of(metrics, f"lucid_build_info{{{labels}}}") == 1
        assert ready["python"] == compilation.PYTHON
        assert ready["compiled"] is IS_COMPILED
        assert f"  runs       Python {compilation.PYTHON}, {'compiled' if IS_COMPILED else 'interpreted'}" in served.log


def test_this_process_has_the_form_that_is_tested() -> None:
    """Parts that tests run in their own process are compiled as well."""
    assert compilation.FORM.is_compiled is IS_COMPILED
    assert str(attempt.__file__).endswith(".so" if IS_COMPILED else ".py")
