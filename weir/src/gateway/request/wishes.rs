//! What an answer must look like: `response_format`, `tools`, `tool_choice`, `parallel_tool_calls`.
use super::missing;
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use serde_json::{Map, Value, json};
use weir_backends::text::{Choice, Form, Tool, Wishes};

/// Tools of one request, at most.
const TOOLS_MAX: usize = 128;

/// What is wished, and the tools as templates are told of them.
pub(super) fn wishes(fields: &mut Fields) -> Result<(Wishes, Vec<Value>), ApiError> {
    let form = form(fields)?;
    let mut described = fields.array("tools")?.unwrap_or_default();
    if described.len() > TOOLS_MAX {
        let message = format!("Invalid 'tools': {} of them, at most {TOOLS_MAX} are taken.", described.len());
        return Err(ApiError::field("tools", "array_above_max_length", message));
    }
    let mut tools = described.iter().enumerate().map(tool).collect::<Result<Vec<_>, _>>()?;
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let choice = match fields.take("tool_choice") {
        None => Choice::Auto,
        Some(Value::String(choice)) if choice == "auto" => Choice::Auto,
        Some(Value::String(choice)) if choice == "none" => {
            described.clear();
            tools.clear();
            Choice::Auto
        }
        Some(Value::String(choice)) if choice == "required" => {
            some_tool(&tools)?;
            Choice::Required
        }
        Some(Value::Object(choice)) => named(&choice, &tools)?,
        Some(_) => {
            return Err(ApiError::field(
                "tool_choice",
                "invalid_value",
                "Invalid 'tool_choice': expected 'auto', 'none', 'required' or a function by name.",
            ));
        }
    };
    Ok((Wishes { form, tools, choice, parallel }, described))
}

fn some_tool(tools: &[Tool]) -> Result<(), ApiError> {
    if tools.is_empty() {
        let message = "Invalid 'tool_choice': there are no 'tools' to call.";
        return Err(ApiError::field("tool_choice", "invalid_value", message));
    }
    Ok(())
}

fn named(choice: &Map<String, Value>, tools: &[Tool]) -> Result<Choice, ApiError> {
    let kind = choice.get("type").and_then(Value::as_str);
    let name = choice.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
    let (Some("function"), Some(name)) = (kind, name) else {
        let message =
            "Invalid 'tool_choice': expected {\"type\": \"function\", \"function\": {\"name\": ..}}.";
        return Err(ApiError::field("tool_choice", "invalid_value", message));
    };
    match tools.iter().find(|tool| tool.name == name) {
        Some(tool) => Ok(Choice::Named(tool.name.clone())),
        None => {
            let name: String = name.chars().take(64).collect();
            let message = format!("Invalid 'tool_choice': there is no function '{name}' in 'tools'.");
            Err(ApiError::field("tool_choice", "invalid_value", message))
        }
    }
}

fn tool((index, value): (usize, &Value)) -> Result<Tool, ApiError> {
    let Some(described) = value.as_object() else {
        return Err(wrong_type("tools", "an array of objects", value));
    };
    let at = |field: &str| format!("tools[{index}]{field}");
    if described.get("type").and_then(Value::as_str) != Some("function") {
        let message = format!("Invalid '{}': only tools of type 'function' are supported.", at(".type"));
        return Err(ApiError::field(at(".type"), "invalid_value", message));
    }
    let Some(function) = described.get("function").and_then(Value::as_object) else {
        return Err(missing(at(".function")));
    };
    let name = function.get("name").and_then(Value::as_str).ok_or_else(|| missing(at(".function.name")))?;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(fits) {
        let message = format!(
            "Invalid '{}': expected 1 to 64 letters, digits, underscores, dots and dashes.",
            at(".function.name")
        );
        return Err(ApiError::field(at(".function.name"), "invalid_value", message));
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => {
            json!({ "type": "object", "properties": {}, "additionalProperties": false })
        }
        Some(Value::Object(schema)) => of_object(schema.clone()).ok_or_else(|| {
            let param = at(".function.parameters");
            let message =
                format!("Invalid '{param}': arguments are an object, so its 'type' must be 'object'.");
            ApiError::field(param, "invalid_function_parameters", message)
        })?,
        Some(other) => return Err(wrong_type(at(".function.parameters"), "an object", other)),
    };
    let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
    Ok(Tool { name: name.to_owned(), parameters, strict })
}

/// A schema that says that it is of an object; none if it says something else.
fn of_object(mut schema: Map<String, Value>) -> Option<Value> {
    match schema.get("type") {
        None => _ = schema.insert("type".into(), "object".into()),
        Some(kind) if *kind == "object" => {}
        Some(_) => return None,
    }
    Some(Value::Object(schema))
}

fn form(fields: &mut Fields) -> Result<Form, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(Form::Text) };
    let within = |error: ApiError| error.within("response_format");
    match format.string("type").map_err(within)?.as_deref() {
        Some("text") => Ok(Form::Text),
        Some("json_object") => Ok(Form::Schema { schema: json!({ "type": "object" }), strict: false }),
        Some("json_schema") => {
            let described = format.object("json_schema").map_err(within)?;
            let mut described = described.ok_or_else(|| missing("response_format.json_schema"))?;
            let within = |error: ApiError| error.within("response_format.json_schema");
            let strict = described.boolean("strict").map_err(within)?.unwrap_or(false);
            let schema = described.object("schema").map_err(within)?;
            let schema = schema.ok_or_else(|| missing("response_format.json_schema.schema"))?;
            Ok(Form::Schema { schema: Value::Object(schema.into_map()), strict })
        }
        _ => Err(ApiError::field(
            "response_format.type",
            "invalid_value",
            "Invalid 'response_format.type': expected 'text', 'json_object' or 'json_schema'.",
        )),
    }
}
