"""The fields of a rig file as Markdown. ``python -m support.rig_table`` (in tests/) writes them into docs/rigs.md."""

from pathlib import Path

from pydantic.fields import FieldInfo

from chatvla_edge.drivers import rig

DOCUMENT = Path(__file__).parents[2] / "docs" / "rigs.md"
BEGIN, END = "<!-- fields: written by tests/support/rig_table.py -->", "<!-- end of fields -->"

PLACES = {
    rig.Rig: "The file itself",
    rig.Camera: "`cameras.NAME`",
    rig.Native: "`cameras.NAME.native`",
    rig.Arm: "`arms.NAME`",
    rig.Limits: "`arms.NAME.limits`",
    rig.Workspace: "`arms.NAME.limits.workspace`",
    rig.GripperAxis: "`arms.NAME.gripper`",
    rig.Device: "`enable`",
    rig.Servo: "`servo`",
    rig.Policy: "`policy`",
    rig.Cores: "`cores`",
}


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if value is None:
        return "null"
    if value == () or value == {} or not isinstance(value, str | bool | int | float):
        return "empty"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def markdown() -> str:
    lines = []
    for part, place in PLACES.items():
        lines += [f"**{place}**", "", "| field | default | |", "|---|---|---|"]
        for name, field in part.model_fields.items():
            lines.append(f"| `{field.alias or name}` | {default(field)} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
