//! What comes back when all is well.
use super::server::Server;
use serde_json::{Value, json};
use weir::driver::ModelSpec;

const MODEL: &str = ModelSpec::NULL;

fn chat(extra: Value) -> Value {
    with(
        json!({ "model": MODEL, "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 6 }),
        extra,
    )
}

fn completion(extra: Value) -> Value {
    with(json!({ "model": MODEL, "prompt": "Hello there", "max_tokens": 6 }), extra)
}

fn with(mut base: Value, extra: Value) -> Value {
    base.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    base
}

fn strings(values: &Value) -> String {
    values.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn models() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await;
    assert_eq!(list.status, 200);
    assert!(list.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    let list = list.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!(MODEL)));
    for alias in
        [MODEL.to_owned(), MODEL.to_uppercase(), format!("someone%2F{MODEL}"), format!("{MODEL}.gguf")]
    {
        let model = server.get(&format!("/v1/models/{alias}")).await.json();
        assert_eq!((&model["object"], &model["id"]), (&json!("model"), &json!(MODEL)), "{alias}");
        assert!(model["weir"]["context"].as_u64().unwrap() > 0);
    }
    assert_eq!(server.send("HEAD", "/v1/models", "", b"").await.body, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn health() {
    let server = Server::start().await;
    for path in ["/healthz", "/readyz"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, &reply.json()["status"]), (200, &json!("ok")), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_chat() {
    let server = Server::start().await;
    let reply = server.chat(&chat(json!({ "seed": 1, "unknown_field": { "x": 1 }, "user": "me" }))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let body = reply.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    let usage = &body["usage"];
    let tokens = |name: &str| usage[name].as_u64().unwrap();
    assert!(tokens("prompt_tokens") > 0 && (1..=6).contains(&tokens("completion_tokens")));
    assert_eq!(tokens("total_tokens"), tokens("prompt_tokens") + tokens("completion_tokens"));
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
    assert!(!body["weir"]["nodes"].as_array().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_chat_says_what_a_whole_one_says() {
    let server = Server::start().await;
    let whole = server.chat(&chat(json!({ "seed": 5 }))).await.json();
    let reply = server.chat(&chat(json!({ "seed": 5, "stream": true }))).await;
    assert!(reply.header("content-type").unwrap().starts_with("text/event-stream"));
    let events = reply.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({ "role": "assistant", "content": "", "refusal": null })
    );
    assert!(events.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == events[0]["id"]));
    assert!(events.iter().all(|e| e.get("usage").is_none()));
    let text: String =
        events.iter().map(|e| e["choices"][0]["delta"]["content"].as_str().unwrap_or("")).collect();
    assert_eq!(Some(text.as_str()), whole["choices"][0]["message"]["content"].as_str());
    let last = events.last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert!(last["weir"]["nodes"].is_array());
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_in_a_stream() {
    let server = Server::start().await;
    for (path, request) in
        [("/v1/chat/completions", chat(json!({}))), ("/v1/completions", completion(json!({})))]
    {
        let request = with(request, json!({ "stream": true, "stream_options": { "include_usage": true } }));
        let events = server.post(path, &request).await.events();
        let (last, others) = events.split_last().unwrap();
        assert!(
            others
                .iter()
                .all(|e| e["usage"].is_null() && e.get("usage").is_some() && e.get("weir").is_none())
        );
        assert_eq!(last["choices"], json!([]));
        assert!(last["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        assert!(last["weir"]["request"].is_u64());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices() {
    let server = Server::start().await;
    let whole = server.chat(&chat(json!({ "n": 3, "seed": 9 }))).await.json();
    let events = server.chat(&chat(json!({ "n": 3, "seed": 9, "stream": true }))).await.events();
    let mut texts = vec![String::new(); 3];
    for event in &events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
    }
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(whole["choices"][index]["index"], index);
        assert_eq!(whole["choices"][index]["message"]["content"], text.as_str());
    }
    assert_eq!(events.iter().filter(|e| e["choices"][0]["finish_reason"].is_string()).count(), 3);
    assert_eq!(events.iter().filter(|e| e.get("weir").is_some()).count(), 1);
    let one = server.chat(&chat(json!({ "n": 1, "seed": 9 }))).await.json();
    assert_eq!(one["choices"][0], whole["choices"][0], "the first choice has the request's own seed");
    assert_eq!(one["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"], "a prompt counts once");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_of_every_kind_of_prompt() {
    let server = Server::start().await;
    for (prompt, choices) in [
        (json!("Hello"), 2),
        (json!(["Hello", "World"]), 4),
        (json!([72, 73, 74]), 2),
        (json!([[72], [73, 74], [75]]), 6),
    ] {
        let reply = server.complete(&completion(json!({ "prompt": prompt, "n": 2, "seed": 3 }))).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let body = reply.json();
        assert_eq!(body["object"], "text_completion");
        let indices: Vec<u64> =
            body["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, (0..choices).collect::<Vec<u64>>());
        assert!(body["choices"][0]["text"].is_string());
    }
    let body = server.complete(&json!({ "model": MODEL, "prompt": "x", "ignore_eos": true })).await.json();
    assert_eq!(body["usage"]["completion_tokens"], 16, "the API's own default");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echoed_prompt() {
    let server = Server::start().await;
    let plain = server.complete(&completion(json!({ "seed": 2 }))).await.json();
    let expected = format!("Hello there{}", plain["choices"][0]["text"].as_str().unwrap());
    let body = server.complete(&completion(json!({ "seed": 2, "echo": true }))).await.json();
    assert_eq!(body["choices"][0]["text"], expected);
    let events =
        server.complete(&completion(json!({ "seed": 2, "echo": true, "stream": true }))).await.events();
    let text: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities() {
    let server = Server::start().await;
    let body = server.chat(&chat(json!({ "logprobs": true, "top_logprobs": 3 }))).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(!content.is_empty());
    for entry in content {
        assert!(entry["token"].is_string() && entry["bytes"].is_array());
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
    }
    let none = server.chat(&chat(json!({ "logprobs": true }))).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));

    let legacy = server.complete(&completion(json!({ "logprobs": 2, "seed": 4 }))).await.json();
    let legacy = &legacy["choices"][0]["logprobs"];
    let count = legacy["tokens"].as_array().unwrap().len();
    assert!(count > 0);
    for list in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(legacy[list].as_array().unwrap().len(), count, "{list}");
    }
    assert_eq!(legacy["text_offset"][0], 0);

    let request = completion(json!({ "logprobs": 2, "seed": 4, "stream": true }));
    let events = server.complete(&request).await.events();
    let chunks: Vec<&Value> =
        events.iter().map(|e| &e["choices"][0]["logprobs"]).filter(|l| l.is_object()).collect();
    let tokens: String = chunks.iter().map(|l| strings(&l["tokens"])).collect();
    assert_eq!(tokens, strings(&legacy["tokens"]));
    let offsets: Vec<&Value> = chunks.iter().flat_map(|l| l["text_offset"].as_array().unwrap()).collect();
    assert_eq!(offsets, legacy["text_offset"].as_array().unwrap().iter().collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_optional_field() {
    let server = Server::start().await;
    let reply = server
        .chat(&chat(json!({
            "temperature": 0.7, "top_p": 0, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1,
            "frequency_penalty": -2, "presence_penalty": 2, "logit_bias": { "7": -100 }, "seed": -1,
            "stop": ["never said", "nor this"], "max_completion_tokens": 3, "max_tokens": 100, "n": null,
            "response_format": { "type": "text" }, "tool_choice": "auto", "store": true, "ignore_eos": true,
            "tools": [{ "type": "function", "function": { "name": "f", "parameters": {} } }],
            "weir": { "priority": "interactive", "tags": { "team": "a" } },
        })))
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["usage"]["completion_tokens"], 3, "max_completion_tokens goes before max_tokens");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_every_kind() {
    let server = Server::start().await;
    let reply = server
        .chat(&chat(json!({ "messages": [
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "one" }, { "type": "text", "text": "two" }] },
            { "role": "assistant", "content": null, "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] },
            { "role": "tool", "tool_call_id": "1", "content": "three" },
        ] })))
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_tokens_that_people_type_stay_text() {
    let server = Server::start().await;
    let length = async |content: &str| {
        let messages = json!([{ "role": "user", "content": content }]);
        server.chat(&chat(json!({ "messages": messages }))).await.json()["usage"]["prompt_tokens"].clone()
    };
    // The null model reads bytes, and has the control token <|end|>.
    assert_eq!(length("say <|end|> to me").await, length("say 1234567 to me").await);
    let raw = server.complete(&completion(json!({ "prompt": "<|end|>" }))).await.json();
    assert_eq!(raw["usage"]["prompt_tokens"], 1, "a plain prompt is the caller's own: {raw}");
}
