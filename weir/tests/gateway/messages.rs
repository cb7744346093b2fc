//! Anthropic's API over our own model.
use super::server::{Reply, Server};
use serde_json::{Value, json};
use weir::driver::ModelSpec;

const MODEL: &str = ModelSpec::NULL;
const MESSAGES: &str = "/v1/messages";

fn ask(extra: Value) -> Value {
    let mut ask = json!({ "model": MODEL, "max_tokens": 6, "messages": [{ "role": "user", "content": "Hello" }], "seed": 1 });
    ask.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ask
}

/// The events of a stream: each has its name as its type.
pub fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    let event = |text: &str| {
        let (name, data) = text.strip_prefix("event: ").and_then(|e| e.split_once("\ndata: ")).expect(text);
        let data: Value = serde_json::from_str(data).expect(text);
        assert_eq!(data["type"], name);
        data
    };
    reply.body.split("\n\n").filter(|text| !text.is_empty()).map(event).collect()
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

fn text(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["delta"]["text"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_message_and_a_streamed_one() {
    let server = Server::start().await;
    let reply =
        server.post(MESSAGES, &ask(json!({ "system": "Be brief.", "metadata": { "user_id": "u" } }))).await;
    assert!(reply.header("request-id").is_some_and(|id| id.starts_with("req_")), "{reply:?}");
    let whole = reply.json();
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["model"]),
        (&json!("message"), &json!("assistant"), &json!(MODEL))
    );
    assert!(whole["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(whole["content"].as_array().unwrap().len(), 1);
    assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!("max_tokens"), &Value::Null));
    let tokens = |name: &str| whole["usage"][name].as_u64().unwrap();
    assert!(tokens("input_tokens") > 0 && tokens("output_tokens") == 6);
    assert!(!whole["weir"]["nodes"].as_array().unwrap().is_empty());

    let reply = server
        .post(MESSAGES, &ask(json!({ "system": [{ "type": "text", "text": "Be brief." }], "stream": true })))
        .await;
    let events = events(&reply);
    let expected = [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(kinds(&events), expected, "{reply:?}");
    let start = &events[0]["message"];
    assert_eq!((&start["content"], &start["stop_reason"]), (&json!([]), &Value::Null));
    assert!(start["usage"]["input_tokens"].as_u64().unwrap() > 0);
    assert_eq!(
        events[2],
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } })
    );
    assert_eq!(text(&events), whole["content"][0]["text"].as_str().unwrap());
    let delta = &events[events.len() - 2];
    assert_eq!(delta["delta"], json!({ "stop_reason": "max_tokens", "stop_sequence": null }));
    assert_eq!(delta["usage"]["output_tokens"], 6);
    assert!(delta["weir"]["request"].is_u64());
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_sequences_and_what_an_answer_begins_with() {
    let server = Server::start().await;
    let plain = server.post(MESSAGES, &ask(json!({}))).await.json();
    let said = plain["content"][0]["text"].as_str().unwrap().to_owned();
    let third = said.char_indices().nth(3).map(|(at, c)| said[at..at + c.len_utf8()].to_owned()).unwrap();
    let stopped =
        server.post(MESSAGES, &ask(json!({ "stop_sequences": ["never said", third] }))).await.json();
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!(third))
    );
    let before = said.split(&third).next().unwrap();
    assert_eq!(stopped["content"][0]["text"].as_str().unwrap_or(""), before);

    let count = |ask: Value| {
        let server = &server;
        async move {
            server.post("/v1/messages/count_tokens", &ask).await.json()["input_tokens"].as_u64().unwrap()
        }
    };
    let asked = json!({ "model": MODEL, "messages": [{ "role": "user", "content": "Hello" }] });
    let mut begun = asked.clone();
    begun["messages"].as_array_mut().unwrap().push(json!({ "role": "assistant", "content": "Well," }));
    let more = count(begun.clone()).await;
    assert_eq!(count(asked).await + 5, more, "a token a byte, and no turn of its own");
    begun["max_tokens"] = 3.into();
    let answer = server.post(MESSAGES, &begun).await.json();
    assert_eq!(
        answer["usage"]["input_tokens"].as_u64().unwrap()
            + answer["usage"]["cache_read_input_tokens"].as_u64().unwrap(),
        more
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_with_blocks_are_read() {
    let server = Server::start().await;
    let turns = json!([
        { "role": "user", "content": [{ "type": "text", "text": "Look", "cache_control": { "type": "ephemeral" } }] },
        { "role": "assistant", "content": [
            { "type": "thinking", "thinking": "hm", "signature": "s" }, { "type": "text", "text": "I do." },
        ] },
        { "role": "user", "content": [
            { "type": "document", "source": { "type": "text", "media_type": "text/plain", "data": "long" } },
            { "type": "text", "text": "And?" },
        ] },
    ]);
    let reply = server
        .post(
            MESSAGES,
            &ask(json!({ "messages": turns, "thinking": { "type": "enabled", "budget_tokens": 1024 } })),
        )
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

async fn check_refused(server: &Server, fields: Value, status: u16, kind: &str, words: &str) {
    let reply = server.post(MESSAGES, &ask(fields.clone())).await;
    let body = reply.json();
    assert_eq!(
        (reply.status, &body["type"], &body["error"]["type"]),
        (status, &json!("error"), &json!(kind)),
        "{fields}: {reply:?}"
    );
    assert!(body["error"]["message"].as_str().unwrap().contains(words), "{words:?}: {body}");
    assert!(body["request_id"].as_str().unwrap().starts_with("req_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_in_anthropics_words() {
    let server = Server::start().await;
    let turn = |content: Value| json!({ "messages": [{ "role": "user", "content": content }] });
    let image = json!([{ "type": "image", "source": { "type": "base64", "media_type": "image/png", "data": "AAAA" } }]);
    for (fields, words) in [
        (json!({ "max_tokens": null }), "max_tokens"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [{ "role": "system", "content": "x" }] }), "messages[0].role"),
        (
            json!({ "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "x " }] }),
            "white space",
        ),
        (
            json!({
                "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "{" }],
                "output_config": { "format": { "type": "json_schema", "schema": { "type": "object" } } },
            }),
            "whose beginning is given",
        ),
        (json!({ "temperature": 1.5 }), "temperature"),
        (json!({ "stop_sequences": "x" }), "stop_sequences"),
        (json!({ "stop_sequences": [""] }), "stop_sequences"),
        (json!({ "system": [{ "type": "image" }] }), "system[0]"),
        (
            json!({ "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }),
            "web_search_20250305",
        ),
        (json!({ "thinking": { "type": "perhaps" } }), "thinking.type"),
        (turn(json!([])), "messages[0].content"),
        (turn(json!([{ "type": "text" }])), "messages[0].content[0].text"),
        (turn(json!([{ "type": "odd" }])), "'odd'"),
        (turn(image), "only reads text"),
    ] {
        check_refused(&server, fields, 400, "invalid_request_error", words).await;
    }
    check_refused(&server, json!({ "model": "no-such" }), 404, "not_found_error", "no-such").await;
    let wrong = server.get("/v1/messages").await;
    assert_eq!((wrong.status, &wrong.json()["type"]), (405, &json!("error")));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_in_either_header_and_no_room_is_529() {
    let server = Server::with(|c| {
        c.api_key = Some("secret".into());
        c.limits.requests_max = 0;
    })
    .await;
    let body = ask(json!({})).to_string();
    let json_type = "content-type: application/json\r\nanthropic-version: 2023-06-01\r\n";
    for (header, status, kind) in [
        ("", 401, "authentication_error"),
        ("x-api-key: wrong\r\n", 401, "authentication_error"),
        ("x-api-key: secret\r\n", 429, "rate_limit_error"),
        ("authorization: Bearer secret\r\n", 429, "rate_limit_error"),
    ] {
        let reply = server.send("POST", MESSAGES, &format!("{json_type}{header}"), body.as_bytes()).await;
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (status, &json!(kind)), "{header:?}");
    }
    let server = Server::start().await;
    server.driver.shutdown().await;
    let reply = server.post(MESSAGES, &ask(json!({}))).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["type"]),
        (529, &json!("overloaded_error")),
        "{reply:?}"
    );
}
