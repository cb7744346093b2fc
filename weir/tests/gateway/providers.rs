//! Every API, answered by a provider that speaks another.
#[path = "../../../upstream/tests/suite/mock.rs"]
#[expect(dead_code, reason = "the provider's own tests use all of it")]
mod mock;

use super::messages::events;
use super::server::Server;
use mock::{Mock, Script, chunk};
use serde_json::{Value, json};
use std::time::Duration;
use weir_upstream::{Catalog, Entry, Secret, Times, Upstream};

const MODEL: &str = "mock/m";
const TOOLS: &str = "/v1/messages";

/// A gateway without a node, whose provider speaks `api`.
async fn house(api: &str, scripts: Vec<Script>) -> (Server, Mock) {
    let mock = Mock::start(scripts);
    let price = json!({ "prompt": 1.0, "output": 2.0 });
    let entry = json!({
        "name": "mock", "url": mock.url, "key_env": "MOCK_KEY", "api": api,
        "models": [{ "name": "m", "context": 100_000, "usd_per_mtok": price }],
    });
    let entry: Entry = serde_json::from_value(entry).unwrap();
    let provider = Catalog::built_in().unwrap().resolve(&entry).unwrap();
    let server = Server::start().await;
    server
        .driver
        .attach_upstream(Upstream::new(provider, Secret::new("sk-secret"), Times::default()).unwrap());
    for _ in 0..100 {
        if server.driver.model(MODEL).is_some() {
            return (server, mock);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the provider's model isn't there");
}

/// Anthropic's events of a thought, a text and a tool call.
fn thoughtful() -> Script {
    let data = [
        json!({ "type": "message_start", "message": { "usage": { "input_tokens": 10, "output_tokens": 1 } } }),
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "thinking", "thinking": "" } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "thinking_delta", "thinking": "Hm." } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "signature_delta", "signature": "sig" } }),
        json!({ "type": "content_block_start", "index": 1, "content_block": { "type": "text", "text": "" } }),
        json!({ "type": "content_block_delta", "index": 1, "delta": { "type": "text_delta", "text": "I look." } }),
        json!({ "type": "content_block_start", "index": 2, "content_block": { "type": "tool_use", "id": "t1", "name": "look", "input": {} } }),
        json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "input_json_delta", "partial_json": "{\"at\":" } }),
        json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "input_json_delta", "partial_json": "1}" } }),
        json!({ "type": "message_delta", "delta": { "stop_reason": "tool_use" }, "usage": { "output_tokens": 20 } }),
        json!({ "type": "message_stop" }),
    ];
    Script::events(&data.map(|event| event.to_string()))
}

fn messages() -> Value {
    json!({
        "model": MODEL, "max_tokens": 50, "system": [{ "type": "text", "text": "Be brief.", "cache_control": { "type": "ephemeral" } }],
        "messages": [
            { "role": "user", "content": [
                { "type": "image", "source": { "type": "base64", "media_type": "image/png", "data": "AAAA" } },
                { "type": "text", "text": "What is it?" },
            ] },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "I had better look.", "signature": "old" },
                { "type": "tool_use", "id": "t0", "name": "look", "input": { "at": 0 } },
            ] },
            { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t0", "content": [{ "type": "text", "text": "a cat" }] }] },
        ],
        "tools": [{ "name": "look", "input_schema": { "type": "object", "properties": { "at": { "type": "integer" } } } }],
        "tool_choice": { "type": "any", "disable_parallel_tool_use": true },
        "thinking": { "type": "enabled", "budget_tokens": 1024 }, "stop_sequences": ["END"],
        "weir": { "tags": { "a": "b" } },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_who_speaks_the_same_goes_as_it_came() {
    let (server, mock) = house("anthropic", vec![thoughtful()]).await;
    let answer = server.post(TOOLS, &messages()).await.json();
    let expected = json!([
        { "type": "thinking", "thinking": "Hm.", "signature": "sig" },
        { "type": "text", "text": "I look." },
        { "type": "tool_use", "id": "t1", "name": "look", "input": { "at": 1 } },
    ]);
    assert_eq!((&answer["content"], &answer["stop_reason"]), (&expected, &json!("tool_use")), "{answer}");
    assert_eq!(
        (&answer["usage"]["input_tokens"], &answer["usage"]["output_tokens"]),
        (&json!(10), &json!(20))
    );
    assert_eq!(answer["weir"]["cost_usd"], 50e-6);
    let sent = &mock.seen()[0].body;
    let mut asked = messages();
    for name in ["system", "messages", "tools", "tool_choice", "thinking", "stop_sequences"] {
        assert_eq!(sent[name], asked[name].take(), "{name}");
    }
    assert!(sent.get("weir").is_none() && sent["model"] == "m");

    let mut streamed = messages();
    streamed["stream"] = true.into();
    let events = events(&server.post(TOOLS, &streamed).await);
    let blocks: Vec<&Value> = events
        .iter()
        .filter(|e| e["type"] == "content_block_start")
        .map(|e| &e["content_block"]["type"])
        .collect();
    assert_eq!(blocks, ["thinking", "text", "tool_use"]);
    let json: String = events.iter().filter_map(|e| e["delta"]["partial_json"].as_str()).collect();
    assert_eq!(json, "{\"at\":1}");
    assert!(events.iter().any(|e| e["delta"]["signature"] == "sig"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_who_speaks_openais_is_translated() {
    let call = |function: Value| json!({ "tool_calls": [{ "index": 0, "id": "c1", "type": "function", "function": function }] });
    let mut data = vec![
        chunk(&json!({ "reasoning_content": "Hm." }), None),
        chunk(&json!({ "content": "I look." }), None),
        chunk(&call(json!({ "name": "look", "arguments": "{\"at\"" })), None),
        chunk(&call(json!({ "arguments": ":1}" })), None),
        chunk(&json!({}), Some("tool_calls")),
    ];
    data.push("[DONE]".into());
    let (server, mock) = house("openai", vec![Script::events(&data)]).await;
    let answer = server.post(TOOLS, &messages()).await.json();
    let expected = json!([
        { "type": "thinking", "thinking": "Hm.", "signature": "" },
        { "type": "text", "text": "I look." },
        { "type": "tool_use", "id": "c1", "name": "look", "input": { "at": 1 } },
    ]);
    assert_eq!((&answer["content"], &answer["stop_reason"]), (&expected, &json!("tool_use")), "{answer}");
    let sent = &mock.seen()[0].body;
    let asked = json!([
        { "role": "system", "content": [{ "type": "text", "text": "Be brief." }] },
        { "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } },
            { "type": "text", "text": "What is it?" },
        ] },
        { "role": "assistant", "content": "", "tool_calls": [
            { "id": "t0", "type": "function", "function": { "name": "look", "arguments": "{\"at\":0}" } },
        ] },
        { "role": "tool", "tool_call_id": "t0", "content": [{ "type": "text", "text": "a cat" }] },
    ]);
    assert_eq!(sent["messages"], asked);
    assert_eq!((&sent["stop"], &sent["tool_choice"]), (&json!(["END"]), &json!("required")));
    assert_eq!(sent["parallel_tool_calls"], false);
    assert!(
        sent.get("thinking").is_none()
            && sent.get("system").is_none()
            && sent.get("stop_sequences").is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_finds_wrong_is_said() {
    let (server, _mock) = house("anthropic", vec![Script::error(400, "too many pixels")]).await;
    let reply = server.post(TOOLS, &messages()).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["type"]),
        (400, &json!("invalid_request_error")),
        "{reply:?}"
    );
    assert!(reply.body.contains("too many pixels"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_of_a_provider_has_items() {
    let (server, mock) = house("anthropic", vec![thoughtful()]).await;
    let ask = json!({
        "model": MODEL, "instructions": "Be brief.", "max_output_tokens": 50, "tool_choice": "required",
        "tools": [{ "type": "function", "name": "look", "parameters": { "type": "object" }, "strict": null }],
        "input": [
            { "role": "user", "content": [
                { "type": "input_image", "image_url": "data:image/png;base64,AAAA" }, { "type": "input_text", "text": "What is it?" },
            ] },
            { "type": "reasoning", "id": "rs_1", "summary": [], "content": [{ "type": "reasoning_text", "text": "I look." }] },
            { "type": "function_call", "call_id": "t0", "name": "look", "arguments": "{\"at\":0}" },
            { "type": "function_call", "call_id": "t1", "name": "look", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "t0", "output": "a cat" },
            { "type": "function_call_output", "call_id": "t1", "output": "a dog" },
        ],
    });
    let whole = server.post("/v1/responses", &ask).await.json();
    let kinds: Vec<&Value> = whole["output"].as_array().unwrap().iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"], "{whole}");
    assert_eq!(whole["output"][0]["content"][0], json!({ "type": "reasoning_text", "text": "Hm." }));
    let call = &whole["output"][2];
    assert_eq!(
        (&call["call_id"], &call["name"], &call["arguments"]),
        (&json!("t1"), &json!("look"), &json!("{\"at\":1}"))
    );
    assert_eq!(whole["status"], "completed");
    let turns = &mock.seen()[0].body["messages"];
    let kinds: Vec<&Value> = turns
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|turn| turn["content"].as_array().unwrap())
        .map(|block| &block["type"])
        .collect();
    assert_eq!(kinds, ["image", "text", "tool_use", "tool_use", "tool_result", "tool_result"], "{turns}");
    assert_eq!(mock.seen()[0].body["tool_choice"], json!({ "type": "any" }));

    let mut streamed = ask;
    streamed["stream"] = true.into();
    let events = events(&server.post("/v1/responses", &streamed).await);
    let last = events.last().unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["output"][2]["arguments"]),
        (&json!("response.completed"), &call["arguments"])
    );
    let done = events.iter().find(|e| e["type"] == "response.function_call_arguments.done").unwrap();
    assert_eq!((&done["output_index"], &done["arguments"]), (&json!(2), &call["arguments"]));
    assert!(events.iter().any(|e| e["type"] == "response.reasoning_text.done" && e["text"] == "Hm."));
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_pass_through() {
    let said = json!({
        "object": "list", "model": "m", "data": [{ "object": "embedding", "index": 0, "embedding": [0.5, -0.5] }],
        "usage": { "prompt_tokens": 7, "total_tokens": 7 },
    });
    let (server, mock) = house("openai", vec![Script::new(200, "application/json", &said.to_string())]).await;
    let ask =
        json!({ "model": MODEL, "input": ["Hello"], "dimensions": 2, "weir": { "tags": { "a": "b" } } });
    let answer = server.post("/v1/embeddings", &ask).await.json();
    assert_eq!(
        (&answer["object"], &answer["data"], &answer["usage"]),
        (&said["object"], &said["data"], &said["usage"]),
        "{answer}"
    );
    assert_eq!((&answer["model"], &answer["weir"]["cost_usd"]), (&json!(MODEL), &json!(7e-6)));
    let seen = &mock.seen()[0];
    assert_eq!(
        (seen.path.as_str(), &seen.body),
        ("/v1/embeddings", &json!({ "model": "m", "input": ["Hello"], "dimensions": 2 }))
    );
    for (fields, code, param) in [
        (json!({ "input": "" }), "invalid_value", "input"),
        (json!({ "input": [{}] }), "invalid_type", "input"),
        (json!({ "encoding_format": "odd" }), "invalid_value", "encoding_format"),
        (json!({ "model": "null" }), "unsupported_parameter", "model"),
    ] {
        let mut ask = json!({ "model": MODEL, "input": "x" });
        ask.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(
            server.post("/v1/embeddings", &ask).await.error(),
            (400, code.into(), param.into()),
            "{fields}"
        );
    }
}
