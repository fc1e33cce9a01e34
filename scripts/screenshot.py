"""Takes the picture of the playground that the README shows.

    python scripts/screenshot.py TRACED_QA_FOLDER [docs/images/playground.png]

Needs Debian's chromium and chromium-driver, and selenium. The folder is a model that answers
questions, as examples/question_answering/README.md traces it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    target = Path(sys.argv[2]) if sys.argv[2:] else ROOT / "docs/images/playground.png"

    import stub_server
    from browser import browser
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from ft_handler.playground.local import Playground
    from ft_handler.playground.upstream import named

    stub = stub_server.Stub({"qa": stub_server.opened(folder, "qa")})
    playground = Playground(named(stub.url, stub.url, stub.url, None))
    with (
        tempfile.TemporaryDirectory() as profile,
        stub_server.running(stub),
        stub_server.running(playground),
        browser(Path(profile), "1180,800") as driver,
    ):
        # The figures are this machine's and this moment's: the second request is a usual one.
        for _ in range(2):
            driver.get("about:blank")
            driver.get(f"{playground.url}#qa")
            wait = WebDriverWait(driver, 60, 0.1)
            wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "body[data-ready]"))
            driver.find_element(By.ID, "send").click()
            wait.until(lambda d: "allowed" in d.find_element(By.ID, "padding").text)
        # What stands there is a port of the moment.
        driver.execute_script(
            "document.getElementById('server').textContent = 'http://127.0.0.1:8080';"
            "document.activeElement.blur()"
        )
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 1180, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            driver.save_screenshot(file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.name, target)


if __name__ == "__main__":
    main()
