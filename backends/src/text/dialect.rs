//! How a model's family calls tools, and whether it thinks aloud first; and how tools are told to models whose template
//! doesn't know them.
use serde_json::{Map, Value as Json, json};

/// A family's ways, read off its chat template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// How it calls tools.
    pub calls: Calls,
    /// Answers may begin with `<think>...</think>`.
    pub thinks: bool,
}

/// How a tool is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, perhaps several, perhaps after text: Hermes, Qwen.
    Tagged,
    /// The same, by models whose template knows no tools, or another way: a system message tells them.
    Told,
    /// The answer is `{"name": .., "parameters": {..}}`: Llama 3.
    Bare,
}

/// What encloses a tagged call.
pub(super) const CALL_OPEN: &str = "<tool_call>";
pub(super) const CALL_CLOSE: &str = "</tool_call>";
/// What encloses thoughts.
pub(super) const THINK_OPEN: &str = "<think>";
pub(super) const THINK_CLOSE: &str = "</think>";

impl Calls {
    /// What a call's arguments are called.
    pub(super) fn arguments(self) -> &'static str {
        match self {
            Calls::Tagged | Calls::Told => "arguments",
            Calls::Bare => "parameters",
        }
    }
}

impl Dialect {
    /// Of the template's source, or the one for prompts with tools where that is another.
    pub(super) fn of(default: &str, with_tools: Option<&str>) -> Dialect {
        let source = with_tools.unwrap_or(default);
        let has = |text: &str| source.contains(text);
        let calls = if !has("tools") || has("<function=") {
            Calls::Told
        } else if has(CALL_OPEN) {
            Calls::Tagged
        } else if has("\"parameters\"") && has("ipython") {
            Calls::Bare
        } else {
            Calls::Told
        };
        Dialect { calls, thinks: default.contains(THINK_CLOSE) }
    }
}

/// Messages that tell of tools in words: `tools` in the system message, calls and their results as text. In a template that
/// doesn't know tools.
pub(super) fn tell(messages: Vec<Json>, tools: Option<&Json>) -> Vec<Json> {
    let mut told: Vec<Json> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        let role = message.get("role").and_then(Json::as_str).unwrap_or_default();
        let content = message.get("content").and_then(Json::as_str).unwrap_or_default();
        match role {
            "tool" | "function" => {
                let result = format!("<tool_response>\n{content}\n</tool_response>");
                match told.last_mut().filter(|last| last["role"] == "user" && last["results"] == true) {
                    Some(last) => {
                        let before = last["content"].as_str().unwrap_or_default();
                        last["content"] = format!("{before}\n{result}").into();
                    }
                    None => told.push(json!({ "role": "user", "content": result, "results": true })),
                }
            }
            "assistant" => told.push(with_calls_as_text(message)),
            _ => told.push(message),
        }
    }
    if let Some(tools) = tools.and_then(Json::as_array).filter(|tools| !tools.is_empty()) {
        let manual = manual(tools);
        match told.first_mut().filter(|first| first["role"] == "system") {
            Some(first) => {
                let before = first["content"].as_str().unwrap_or_default();
                first["content"] = format!("{before}\n\n{manual}").into();
            }
            None => told.insert(0, json!({ "role": "system", "content": manual })),
        }
    }
    told
}

fn manual(tools: &[Json]) -> String {
    let list: Vec<String> = tools.iter().map(Json::to_string).collect();
    format!(
        "# Tools\n\nYou may call one or more functions. These are there, as JSON:\n<tools>\n{}\n</tools>\n\nTo call one, \
         answer with a JSON object of its name and arguments, between tags:\n{CALL_OPEN}\n{{\"name\": <function's name>, \
         \"arguments\": <object of its arguments>}}\n{CALL_CLOSE}\nThe results come between <tool_response> tags.",
        list.join("\n")
    )
}

fn with_calls_as_text(message: Json) -> Json {
    let Json::Object(mut message) = message else { return message };
    let Some(Json::Array(calls)) = message.remove("tool_calls") else { return Json::Object(message) };
    let mut content = message.get("content").and_then(Json::as_str).unwrap_or_default().to_owned();
    for call in &calls {
        let function = call.get("function").unwrap_or(call);
        let mut said = Map::new();
        for field in ["name", "arguments"] {
            said.insert(field.into(), function.get(field).cloned().unwrap_or_default());
        }
        if !content.is_empty() {
            content.push('\n');
        }
        content.push_str(&format!("{CALL_OPEN}\n{}\n{CALL_CLOSE}", Json::Object(said)));
    }
    message.insert("content".into(), content.into());
    Json::Object(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialects_are_read_off_templates() {
        let check = |source: &str, calls: Calls, thinks: bool| {
            assert_eq!(Dialect::of(source, None), Dialect { calls, thinks }, "{source}");
        };
        check("{{ messages }}", Calls::Told, false);
        check("{% if tools %}<tools></tools><tool_call>{% endif %}", Calls::Tagged, false);
        check("{% if tools %}<tool_call>\\n<function=name>{% endif %}", Calls::Told, false);
        check("{% if tools %}{\"name\": x, \"parameters\": y}{% endif %} ipython", Calls::Bare, false);
        check("{% if tools %}[TOOL_CALLS]{% endif %}", Calls::Told, false);
        check("{{ content.split('</think>')[-1] }}", Calls::Told, true);
        assert_eq!(Dialect::of("plain", Some("tools <tool_call>")).calls, Calls::Tagged);
    }

    #[test]
    fn tools_are_told_in_words() {
        let call =
            json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "a": 1 } } });
        let messages = vec![
            json!({ "role": "user", "content": "Go." }),
            json!({ "role": "assistant", "content": "", "tool_calls": [call] }),
            json!({ "role": "tool", "content": "2", "tool_call_id": "1" }),
            json!({ "role": "tool", "content": "3", "tool_call_id": "2" }),
        ];
        let told = tell(messages, Some(&json!([{ "type": "function", "function": { "name": "f" } }])));
        let content = |i: usize| told[i]["content"].as_str().unwrap();
        assert_eq!(told.len(), 4);
        assert!(
            told[0]["role"] == "system"
                && content(0).contains(r#"{"type":"function","function":{"name":"f"}}"#)
        );
        assert_eq!(content(2), "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"a\":1}}\n</tool_call>");
        let results = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>";
        assert_eq!((told[3]["role"].as_str(), content(3)), (Some("user"), results));
    }
}
