"""`python -m flows.alert URL` makes Prefect's server POST to URL when a run of a millrace deployment failed.

The server watches (an automation on state events), not the flow: a hook would die with a flow process that is
killed, and would say nothing of a run that never started. Runs that the guard resumes do not count as failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING
from uuid import UUID

import httpx

if TYPE_CHECKING:
    from prefect.automations import AutomationCore

NAME = "millrace-alert"
TAG = "millrace"  # of the deployments in prefect.yaml

# `text` is what chat services show; each value is escaped on its own, so that any message stays valid JSON.
PAYLOAD = """{
  "text": {{ (deployment.name ~ ": run " ~ flow_run.name ~ " " ~ flow_run.state.name ~ ". "
              ~ (flow_run.state.message or "")) | tojson }},
  "deployment": {{ deployment.name | tojson }},
  "flow_run": {{ flow_run.name | tojson }},
  "flow_run_id": {{ flow_run.id | string | tojson }},
  "scheduled": {{ flow_run.auto_scheduled | tojson }},
  "state": {{ flow_run.state.name | tojson }},
  "message": {{ flow_run.state.message | tojson }},
  "url": {{ flow_run | ui_url | tojson }}
}"""


def install(url: str) -> None:
    """Saves the address as a Webhook block and points the alert at it; a second call replaces the address."""
    from prefect.blocks.webhook import Webhook
    from prefect.client.orchestration import get_client

    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    automation = failure_alert(UUID(str(block.save(NAME, overwrite=True))))
    with get_client(sync_client=True) as client:
        existing = client.read_automations_by_name(NAME)
        if existing and existing[0].id:
            client.update_automation(existing[0].id, automation)
        else:
            client.create_automation(automation)


def failure_alert(webhook: UUID) -> AutomationCore:
    """Fires once for each run of a tagged deployment that fails or crashes, whatever its state is called."""
    from prefect.automations import AutomationCore, CallWebhook, EventTrigger, Posture

    trigger = EventTrigger.model_validate(
        {
            "expect": ["prefect.flow-run.*"],
            "match": {
                "prefect.resource.id": "prefect.flow-run.*",
                "prefect.state-type": ["FAILED", "CRASHED"],
            },
            "match_related": [
                {"prefect.resource.role": "deployment"},
                {"prefect.resource.id": f"prefect.tag.{TAG}"},
            ],
            "posture": Posture.Reactive,
            "threshold": 1,
            "within": 0,
        }
    )
    return AutomationCore(
        name=NAME,
        description="Says when a run of a millrace deployment failed; made by `python -m flows.alert`.",
        trigger=trigger,
        actions=[CallWebhook(block_document_id=webhook, payload=PAYLOAD)],
    )


def main() -> int:
    from prefect.settings import get_current_settings

    parser = argparse.ArgumentParser(prog="python -m flows.alert", description="Alert a webhook of failed runs.")
    parser.add_argument("url", nargs="?", default=os.environ.get("MILLRACE_WEBHOOK_URL"), help="where to POST")
    url, api = parser.parse_args().url, get_current_settings().api.url
    if not url:
        parser.error("no address: give the URL, or set MILLRACE_WEBHOOK_URL")
    if not api:
        parser.error("no Prefect server: set PREFECT_API_URL, e.g. http://127.0.0.1:4200/api")
    try:
        install(url)
    except httpx.HTTPError as error:
        print(f"Prefect server at {api} does not answer ({error!r}): start it first", file=sys.stderr)
        return 1
    print(f"failed runs of deployments tagged {TAG!r} are now posted to the Webhook block {NAME!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
