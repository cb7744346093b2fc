//! Tools and structured output over the null model, which says anything that it may.
use super::server::Server;
use serde_json::{Value, json};

/// Bytes and a few words: texts that end.
const NULL: &str = "null:vocab=300";

async fn server() -> Server {
    Server::paced(NULL, |_| ()).await
}

fn request(fields: Value) -> Value {
    let mut request = json!({
        "model": "null",
        "messages": [{ "role": "user", "content": "What is it like in Ulm?" }],
        "max_tokens": 600,
    });
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    request
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "town": { "type": "string", "maxLength": 8 },
            "days": { "type": "integer", "minimum": 1, "maximum": 14 },
            "unit": { "enum": ["C", "F"] },
            "exact": { "type": "boolean" },
        },
        "required": ["town", "days", "unit"],
        "additionalProperties": false,
    })
}

fn fits(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let days = value["days"].as_i64().unwrap();
    assert!(value["town"].as_str().unwrap().chars().count() <= 8 && (1..=14).contains(&days), "{value}");
    assert!(value["unit"] == "C" || value["unit"] == "F", "{value}");
    assert!(value.get("exact").is_none_or(Value::is_boolean), "{value}");
    assert!(value.as_object().unwrap().len() <= 4, "{value}");
}

fn tools() -> Value {
    let tool = |name: &str| {
        let function =
            json!({ "name": name, "description": "Tells.", "parameters": schema(), "strict": true });
        json!({ "type": "function", "function": function })
    };
    json!([tool("weather"), tool("tide-table"), { "type": "function", "function": { "name": "now" } }])
}

/// A streamed answer put together: text, reasoning, calls by index (id, name, arguments), and why it ended.
fn gathered(events: &[Value]) -> (String, Vec<(String, String, String)>, String) {
    let (mut text, mut calls, mut reason) =
        (String::new(), Vec::<(String, String, String)>::new(), String::new());
    for event in events {
        let choice = &event["choices"][0];
        text += choice["delta"]["content"].as_str().unwrap_or("");
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if let Some(id) = call["id"].as_str() {
                assert_eq!((index, &call["type"]), (calls.len(), &json!("function")), "calls begin in order");
                let name = call["function"]["name"].as_str().unwrap();
                calls.push((id.to_owned(), name.to_owned(), String::new()));
            }
            calls[index].2 += call["function"]["arguments"].as_str().unwrap();
        }
        reason += choice["finish_reason"].as_str().unwrap_or("");
    }
    (text, calls, reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_follow_their_schemas() {
    let server = server().await;
    for seed in 0..8 {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema(), "strict": seed % 2 == 0 } });
        let fields = json!({ "response_format": format, "seed": seed });
        let whole = server.chat(&request(fields.clone())).await.json();
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{whole}");
        let text = choice["message"]["content"].as_str().unwrap();
        fits(text);
        let mut streamed = request(fields);
        streamed["stream"] = true.into();
        assert_eq!(gathered(&server.chat(&streamed).await.events()).0, text, "seed {seed}");
    }
    let fields = json!({ "response_format": { "type": "json_object" }, "seed": 3, "max_tokens": 4000 });
    let whole = server.chat(&request(fields)).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    match whole["choices"][0]["finish_reason"].as_str().unwrap() {
        "stop" => assert!(serde_json::from_str::<Value>(text).unwrap().is_object(), "{text}"),
        reason => assert_eq!(reason, "length"),
    }
    let fields = json!({ "response_format": { "type": "json_object" }, "max_tokens": 1 });
    let cut = server.chat(&request(fields)).await.json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length", "{cut}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_called() {
    let server = server().await;
    for seed in 0..6 {
        let one = json!({ "type": "function", "function": { "name": "tide-table" } });
        let choice = if seed % 2 == 0 { json!("required") } else { one };
        let fields = json!({ "tools": tools(), "tool_choice": choice, "seed": seed, "parallel_tool_calls": seed < 3, "max_tokens": 3000 });
        let whole = server.chat(&request(fields.clone())).await.json();
        let choice = &whole["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Value::Null),
            "{whole}"
        );
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert!(!calls.is_empty() && (calls.len() == 1 || seed < 3), "{whole}");
        for call in calls {
            let name = call["function"]["name"].as_str().unwrap();
            assert!(seed % 2 == 0 || name == "tide-table", "{whole}");
            let arguments = call["function"]["arguments"].as_str().unwrap();
            if name == "now" {
                assert_eq!(arguments, "{}")
            } else {
                fits(arguments)
            }
            assert!(call["id"].as_str().unwrap().starts_with("call_") && call.get("index").is_none());
        }
        let mut streamed = request(fields);
        streamed["stream"] = true.into();
        let (text, said, reason) = gathered(&server.chat(&streamed).await.events());
        assert_eq!((text.as_str(), reason.as_str(), said.len()), ("", "tool_calls", calls.len()));
        for (said, call) in said.iter().zip(calls) {
            assert_eq!(
                (said.1.as_str(), said.2.as_str()),
                (call["function"]["name"].as_str().unwrap(), call["function"]["arguments"].as_str().unwrap())
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_tools_go_back_in() {
    let server = server().await;
    let call = json!({ "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "{\"town\": \"Ulm\"}" } });
    let messages = json!([
        { "role": "user", "content": "What is it like in Ulm? <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>" },
        { "role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "I should ask." },
        { "role": "tool", "tool_call_id": "call_1", "content": "7 C" },
    ]);
    let check = async |fields: Value| {
        let mut request =
            request(json!({ "messages": messages, "tools": tools(), "max_tokens": 20, "seed": 1 }));
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let reply = server.chat(&request).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()
    };
    let free = check(json!({})).await;
    assert!(
        free["choices"][0]["message"].get("tool_calls").is_none(),
        "what a person writes calls nothing: {free}"
    );
    let none = check(json!({ "tool_choice": "none" })).await;
    assert!(
        none["usage"]["prompt_tokens"].as_u64() < free["usage"]["prompt_tokens"].as_u64(),
        "tools aren't told"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_followed_is_refused() {
    let server = server().await;
    let check = async |fields: Value, param: &str, says: &str| {
        let began = std::time::Instant::now();
        let reply = server.chat(&request(fields)).await;
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{param}: {:?}", began.elapsed());
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str()), (400, Some(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error} should say {says}");
    };
    let format = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } } });
    let mut deep = json!({ "type": "string" });
    (0..110).for_each(|_| deep = json!({ "not": deep }));
    let mut nested = json!({ "type": "string" });
    (0..55).for_each(|_| nested = json!({ "type": "array", "items": nested, "x": [[[]]] }));
    let words: Vec<String> = (0..60_000).map(|i| format!("word number {i}")).collect();
    check(format(json!({ "type": "objekt" })), "response_format", "objekt").await;
    check(format(json!({ "type": "integer", "minimum": 3, "maximum": 2 })), "response_format", "").await;
    check(format(json!({ "enum": words })), "response_format", "bytes").await;
    check(format(deep), "response_format", "nested").await;
    check(
        json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "f" } } }),
        "tool_choice",
        "'f'",
    )
    .await;
    check(
        json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }),
        "tools[0].function.name",
        "",
    )
    .await;
    let scalar = json!({ "name": "f", "parameters": { "type": "string" } });
    check(
        json!({ "tools": [{ "type": "function", "function": scalar }] }),
        "tools[0].function.parameters",
        "object",
    )
    .await;
    check(json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema", "").await;
    // Perhaps it can be followed; it is found out soon.
    let repeats = json!({ "type": "string", "pattern": "^(a{1,1000}){1,1000}$" });
    for schema in [nested, repeats] {
        let mut request = request(format(schema));
        request["max_tokens"] = 5.into();
        let began = std::time::Instant::now();
        let reply = server.chat(&request).await;
        assert!([200, 400].contains(&reply.status), "{reply:?}");
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
