"""An operator gives a site's own training images as public ones, and they go out as impressions: that site refuses them."""

import json

import numpy as np

from tests.federation_fixture import SITES, Federation, digits_plan, load_arrays


def test_a_site_refuses_its_own_images_and_says_so(federation: Federation) -> None:
    victim = SITES[0]
    stolen = load_arrays(federation.data(victim))
    public = federation.root / "public.npz"
    np.savez(public, images=stolen["train_images"][:40].reshape(-1, 8, 8, 1))
    since = {site: federation.log_size(site) for site in SITES}
    plan = digits_plan(
        strategy="fedimpres",
        rounds=3,
        # Images as they are: no optimisation, no gate, from the first round on.
        strategy_options={
            "start": "images", "start_images": str(public), "steps": 0, "gate": False, "warm_start": False,
            "worth_remembering": 0,
        },
    )  # fmt: skip
    run = federation.submit(plan)
    assert federation.wait(run).state == "DONE"
    last = federation.rounds(run)[-1]
    checks = last["impressions"]["checks"]
    assert set(checks) == set(SITES)
    assert checks[victim]["num_near_in_pixels"] == checks[victim]["num_checked"] > 0
    assert checks[victim]["pixel_smallest"] < 0.01
    assert last["impressions"]["used"][victim] == 0
    assert "impression_check" not in last["training"][victim]
    for site in SITES[1:]:
        check = checks[site]
        assert check["num_near_in_pixels"] < 0.2 * check["num_checked"], "its own images are not among them"
        assert last["impressions"]["used"][site] > 0
    said = [
        json.loads(line) for line in federation.log(victim, since[victim]).splitlines() if "refused" in line
    ]
    assert {line["event"] for line in said} == {"all impressions refused, trained without any"}
    assert all(line["level"] == "warning" and "too near a training image" in line["reason"] for line in said)
    table = federation.ctl("run", "rounds", run).out
    assert "REFUSED" in table
    assert str(sum(check["num_near_in_pixels"] for check in checks.values())) in table.split()
