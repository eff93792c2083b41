"""Stage 10: predictions ⋈ labels that arrived later → quality and drift → event → retraining."""

from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from deploy.monitor import Monitored, monitor
from pipelines.home import open_home
from pipelines.spec import load_spec
from tasks.policy import stage


@stage(tags=["monitor"], timeout_s=900)
def watch(pipeline: str) -> Monitored:
    """Looks at the champion's answers; an alarm becomes the event that the retraining deployment waits for."""
    home, name = open_home(), load_spec(pipeline).pipeline
    found = monitor(home, name)
    page = home.root / "events" / name / "monitor.md"
    create_markdown_artifact(page.read_text(encoding="utf-8"), key="monitor", description=found.line)
    if found.alarms:
        resource = {"prefect.resource.id": f"millrace.model.{name}", "prefect.resource.name": found.release}
        emit_event("millrace.drift", resource=resource, payload={"pipeline": pipeline, "alarms": list(found.alarms)})
    return found
