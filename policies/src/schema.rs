//! The JSON schema of policy files, for editors (Taplo and others take it for TOML).
use crate::fields::vocabulary;
use serde_json::{Value, json};

/// The schema.
pub fn schema() -> Value {
    let names = vocabulary().into_iter().map(|(name, kind, about)| format!("{name} ({kind}): {about}"));
    let names = names.collect::<Vec<_>>().join("\n");
    let whole = json!({
        "type": "string", "maxLength": 4096,
        "description": format!("A CEL expression of type bool over request, pool and time.\n\n{names}"),
    });
    let node = json!({
        "type": "string", "maxLength": 4096,
        "description": format!("A CEL expression of type bool over node, request, pool and time.\n\n{names}"),
    });
    let rule = |kind: &str| {
        let node = &node;
        table(
            json!({
                "name": text("What messages and explanations call it."),
                "why": text("What a person is told whose request it refuses."),
                "when": whole, "that": node,
            }),
            &["that"],
            kind,
        )
    };
    let weight = |least: i32, about: &str| json!({ "type": "number", "minimum": least, "maximum": 10_000, "description": about });
    let objective = json!({
        "latency": weight(0, "Points for each second until the last token."),
        "cost": weight(0, "Points for each US cent."),
        "quality": weight(0, "Points off for each unit of a node's quality."),
    });
    let on_loss = json!({
        "enum": ["resume", "restart", "fail"],
        "description": "What becomes of a stream whose node is lost: another goes on (resume), goes on only where that is exact (restart), or it fails.",
    });
    let mut set = objective.clone();
    set["spill"] = json!({ "type": "boolean", "description": "Providers may be used." });
    set["on_loss"] = on_loss.clone();
    let lists = |about: &str| json!({ "type": "object", "additionalProperties": { "type": "array", "items": { "type": "string" } }, "description": about });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Weir policy",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "about": text("What the policy is for."),
            "timezone": { "type": "string", "pattern": "^(Z|UTC|[+-][0-9]{2}:?[0-9]{2})$", "description": "Of `time`; the scheduler's own where there is none." },
            "objective": table(objective, &[], "What is to be small or large: the least points win."),
            "on_loss": on_loss,
            "spill": table(json!({ "when": whole, "why": text("What a person is told otherwise.") }), &["when"], "When providers may be used; never, without this."),
            "require": array(rule("A node must be so.")),
            "deny": array(rule("A node must not be so.")),
            "prefer": array(table(
                json!({ "name": text("What explanations call it."), "when": whole, "that": node, "weight": weight(-10_000, "Points off where it holds.") }),
                &["that", "weight"],
                "A node had better be so.",
            )),
            "override": array(table(
                json!({ "name": text("What explanations call it."), "when": whole, "set": table(set, &[], "What it sets.") }),
                &["when", "set"],
                "The first that holds sets other weights.",
            )),
            "classes": lists("Models by class: small, medium, large, or another."),
            "fallback": lists("What may stand in for a model, in order."),
            "budget": array(budget()),
        },
    })
}

fn budget() -> Value {
    let mut fields = json!({
        "key": text("For requests with the API key of this name."),
        "tag": text("For requests with this tag."),
        "value": text("Of this value; where there is none, each value has a budget of its own."),
        "everybody": { "type": "boolean", "description": "For all requests together." },
    });
    for period in ["hour", "day", "month"] {
        let usd = format!("Dollars in any {period}.");
        fields[format!("usd_per_{period}")] = json!({ "type": "number", "minimum": 0, "description": usd });
        let tokens = format!("Tokens of prompts and output in any {period}.");
        fields[format!("tokens_per_{period}")] =
            json!({ "type": "integer", "minimum": 0, "description": tokens });
    }
    for what in ["requests", "tokens"] {
        let rate = format!("{what} in a minute.");
        fields[format!("{what}_per_min")] = json!({ "type": "integer", "minimum": 0, "description": rate });
    }
    table(fields, &[], "What a key, a tag or everybody may spend.")
}

fn text(about: &str) -> Value {
    json!({ "type": "string", "description": about })
}

fn array(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

fn table(properties: Value, required: &[&str], about: &str) -> Value {
    json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false,
        "description": about,
    })
}
