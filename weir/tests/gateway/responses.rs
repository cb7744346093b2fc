//! OpenAI's Responses API over our own model.
use super::messages::events;
use super::server::Server;
use serde_json::{Value, json};
use weir::driver::ModelSpec;

const MODEL: &str = ModelSpec::NULL;
const RESPONSES: &str = "/v1/responses";

fn ask(extra: Value) -> Value {
    let mut ask = json!({ "model": MODEL, "input": "Hello", "max_output_tokens": 6, "seed": 1 });
    ask.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ask
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_response_and_a_streamed_one() {
    let server = Server::start().await;
    let extra = json!({ "instructions": "Be brief.", "metadata": { "a": "b" }, "top_logprobs": 2 });
    let whole = server.post(RESPONSES, &ask(extra.clone())).await.json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("incomplete")), "{whole}");
    assert_eq!(whole["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!((&whole["instructions"], &whole["metadata"]), (&json!("Be brief."), &json!({ "a": "b" })));
    assert_eq!((&whole["max_output_tokens"], &whole["store"]), (&json!(6), &json!(true)));
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    let part = &item["content"][0];
    assert_eq!((&part["type"], &part["annotations"]), (&json!("output_text"), &json!([])));
    assert_eq!(part["logprobs"].as_array().unwrap().len(), 6);
    assert_eq!(part["logprobs"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    let usage = &whole["usage"];
    assert_eq!(usage["output_tokens"], 6);
    assert_eq!(usage["total_tokens"].as_u64().unwrap(), 6 + usage["input_tokens"].as_u64().unwrap());
    assert!(!whole["weir"]["nodes"].as_array().unwrap().is_empty());

    let mut streamed = ask(extra);
    streamed["stream"] = true.into();
    let events = events(&server.post(RESPONSES, &streamed).await);
    let mut kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(kinds, expected);
    let numbers: Vec<u64> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let text: String = events.iter().filter_map(|e| e["delta"].as_str()).collect();
    assert_eq!(text, part["text"].as_str().unwrap());
    assert_eq!(
        (&events[0]["response"]["status"], &events[0]["response"]["output"]),
        (&json!("in_progress"), &json!([]))
    );
    let last = &events.last().unwrap()["response"];
    assert_eq!(last["output"][0]["content"], item["content"]);
    assert_eq!(
        (&last["output"][0]["id"], &last["usage"]["output_tokens"]),
        (&events[2]["item"]["id"], &json!(6))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_by_name_for_whoever_began_it() {
    let server = Server::start().await;
    let first = server.post(RESPONSES, &ask(json!({}))).await.json();
    let said = first["output"][0]["content"][0]["text"].as_str().unwrap();
    let id = first["id"].as_str().unwrap();
    let on =
        server.post(RESPONSES, &ask(json!({ "previous_response_id": id, "input": "And?" }))).await.json();
    let whole = json!([
        { "role": "user", "content": "Hello" }, { "role": "assistant", "content": said }, { "role": "user", "content": "And?" },
    ]);
    let same = server.post(RESPONSES, &ask(json!({ "input": whole }))).await.json();
    assert_eq!(on["output"][0]["content"], same["output"][0]["content"], "{on}");
    assert_eq!(on["usage"]["input_tokens"], same["usage"]["input_tokens"]);
    assert_eq!(on["previous_response_id"], id);

    let path = format!("{RESPONSES}/{id}");
    assert_eq!(server.get(&path).await.json(), first);
    let strangers = "authorization: Bearer other\r\n";
    assert_eq!(server.send("GET", &path, strangers, b"").await.error().0, 404);
    assert_eq!(server.send("DELETE", &path, "", b"").await.json()["deleted"], true);
    let reply = server.post(RESPONSES, &ask(json!({ "previous_response_id": on["id"], "input": "x" }))).await;
    let gone = (400, "previous_response_not_found".into(), "previous_response_id".into());
    assert_eq!(reply.error(), gone, "{reply:?}");
    assert!(reply.body.contains("kept in this server's memory"));

    let forgotten = server.post(RESPONSES, &ask(json!({ "store": false }))).await.json();
    let path = format!("{RESPONSES}/{}", forgotten["id"].as_str().unwrap());
    assert_eq!(server.get(&path).await.error(), (404, "response_not_found".into(), String::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said() {
    let server = Server::start().await;
    let item = |item: Value| json!({ "input": [item] });
    for (fields, code, param) in [
        (json!({ "input": null }), "missing_required_parameter", "input"),
        (json!({ "input": [] }), "invalid_value", "input"),
        (json!({ "input": 3 }), "invalid_type", "input"),
        (json!({ "max_output_tokens": 0 }), "integer_below_min_value", "max_output_tokens"),
        (json!({ "temperature": 3 }), "decimal_above_max_value", "temperature"),
        (json!({ "background": true }), "unsupported_parameter", "background"),
        (json!({ "tools": [{ "type": "web_search" }] }), "unsupported_parameter", "tools[0].type"),
        (json!({ "text": { "format": { "type": "odd" } } }), "invalid_value", "text.format.type"),
        (item(json!({ "role": "king", "content": "x" })), "invalid_value", "input[0].role"),
        (item(json!({ "role": "user" })), "missing_required_parameter", "input[0].content"),
        (item(json!({ "type": "item_reference", "id": "x" })), "unsupported_parameter", "input[0]"),
        (
            item(json!({ "type": "function_call", "call_id": "c" })),
            "missing_required_parameter",
            "input[0].name",
        ),
        (json!({ "model": "no-such" }), "model_not_found", "model"),
    ] {
        let reply = server.post(RESPONSES, &ask(fields.clone())).await;
        let (_, got, about) = reply.error();
        assert_eq!((got.as_str(), about.as_str()), (code, param), "{fields}: {reply:?}");
    }
    assert_eq!(server.get(RESPONSES).await.status, 405);
}
