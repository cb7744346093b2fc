//! Providers, by processes: asked outright, when no node of our own can, when one dies, and never for what is private.
use crate::mock::{Ending, Mock, Script, chunk};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use weir_tests::{Connection, Node, Serve, free_address, weir};

/// A null model that takes its time, so that there is a middle to interrupt.
const PACED: &str = "null:step_us=20000,vocab=1000";

/// A program that serves, and a provider that it may ask.
struct House {
    serve: Serve,
    mock: Mock,
    folder: TempDir,
}

impl House {
    /// With these arguments; `more` are lines about the provider.
    fn open(arguments: &[&str], scripts: Vec<Script>, more: &str) -> House {
        let (mock, folder) = (Mock::start(scripts), tempfile::tempdir().unwrap());
        let models =
            "models = [{ name = \"m\", context = 4000, usd_per_mtok = { prompt = 1.0, output = 2.0 } }]";
        let (url, key) = (&mock.url, folder.path().join("key"));
        std::fs::write(&key, "sk-secret-123\n").unwrap();
        let text =
            format!("[[provider]]\nname = \"mock\"\nurl = \"{url}\"\nkey_file = {key:?}\n{models}\n{more}\n");
        let config = folder.path().join("weir.toml");
        std::fs::write(&config, text).unwrap();
        let state = folder.path().join("state");
        let mut all = arguments.to_vec();
        if arguments.contains(&"--listen") {
            all.extend(["--state", state.to_str().unwrap()]);
        }
        let serve = Serve::start(&all, &[("WEIR_CONFIG", config.to_str().unwrap())]);
        House { serve, mock, folder }
    }

    fn chat(&self, body: &Value) -> (u16, Value) {
        let reply = self.serve.post("/v1/chat/completions", &body.to_string()).unwrap();
        (reply.status, reply.json())
    }

    /// A request under way.
    fn stream(&self, body: &Value) -> Stream {
        let mut body = body.clone();
        body["stream"] = true.into();
        let opened = Connection::open(self.serve.address, "POST", "/v1/chat/completions", &body.to_string());
        Stream { connection: opened.unwrap(), raw: String::new() }
    }
}

struct Stream {
    connection: Connection,
    raw: String,
}

impl Stream {
    fn text(&self) -> String {
        self.chunks().filter_map(|c| Some(c["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
    }

    fn chunks(&self) -> impl Iterator<Item = Value> + '_ {
        self.raw.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
    }

    fn read(&mut self, bytes: usize) {
        while self.text().len() < bytes {
            let some = self.connection.some().unwrap();
            assert!(!some.is_empty(), "the stream ended early: {}", self.raw);
            self.raw += &some;
        }
    }

    /// All of its text, and what the last chunk says of where it ran.
    fn end(mut self) -> (String, Value) {
        loop {
            let some = self.connection.some().unwrap();
            if some.is_empty() {
                break;
            }
            self.raw += &some;
        }
        assert!(self.raw.contains("[DONE]"), "{}", &self.raw[self.raw.len().saturating_sub(2000)..]);
        let weir = self.chunks().filter_map(|c| c.get("weir").cloned()).last();
        (self.text(), weir.unwrap_or_default())
    }
}

fn ask(model: &str, otherwise: &[&str]) -> Value {
    let weir = json!({ "otherwise": otherwise });
    json!({ "model": model, "messages": [{ "role": "user", "content": "Why?" }], "max_tokens": 40, "weir": weir })
}

#[test]
fn a_provider_is_asked_outright_without_any_model_here() {
    let house = House::open(&["--no-node"], vec![Script::chat(&["It ", "scatters."])], "");
    let models = house.serve.get("/v1/models").unwrap().json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["owned_by"]),
        (&json!("mock/m"), &json!("mock"))
    );
    let (status, reply) = house.chat(&ask("mock/m", &[]));
    assert_eq!(
        (status, &reply["choices"][0]["message"]["content"]),
        (200, &json!("It scatters.")),
        "{reply}"
    );
    assert_eq!(reply["usage"]["prompt_tokens"], 10, "as the provider counts: {reply}");
    assert_eq!(
        (&reply["weir"]["nodes"], &reply["weir"]["cost_usd"]),
        (&json!(["mock/m"]), &json!(14e-6)),
        "{reply}"
    );
    assert_eq!(reply["weir"]["cost_estimated"], Value::Null, "{reply}");
    let sent = house.mock.seen();
    assert_eq!(sent[0].headers["authorization"], "Bearer sk-secret-123");
    assert!(sent[0].body.get("weir").is_none() && sent[0].body["model"] == "m", "{}", sent[0].body);
    assert_eq!(house.chat(&ask("m", &[])).0, 404, "it must be named in full");
    let stderr = house.serve.stderr();
    assert!(!stderr.contains("sk-secret") && !stderr.contains("Why?"), "{stderr}");
}

#[test]
fn tools_and_errors_of_a_provider_reach_its_client() {
    let call = |call: Value| chunk(&json!({ "tool_calls": [call] }), None);
    let events = [
        call(
            json!({ "index": 0, "id": "c", "type": "function", "function": { "name": "f", "arguments": "{" } }),
        ),
        call(json!({ "index": 0, "function": { "arguments": "}" } })),
        chunk(&json!({}), Some("tool_calls")),
    ];
    let scripts = vec![Script::events(&events), Script::events(&events), Script::error(400, "no such tool")];
    let house = House::open(&["--no-node"], scripts, "");
    let mut body = ask("mock/m", &[]);
    body["tools"] = json!([{ "type": "function", "function": { "name": "f" } }]);
    body["tool_choice"] = "required".into();
    let (status, reply) = house.chat(&body);
    let choice = &reply["choices"][0];
    assert_eq!((status, &choice["finish_reason"]), (200, &json!("tool_calls")), "{reply}");
    let expected = json!({ "id": "c", "type": "function", "function": { "name": "f", "arguments": "{}" } });
    assert_eq!(choice["message"]["tool_calls"], json!([expected]));
    assert_eq!(reply["weir"]["cost_estimated"], true, "it reported no usage: {reply}");
    let mut stream = house.stream(&body);
    while !stream.raw.contains("[DONE]") {
        stream.raw += &stream.connection.some().unwrap();
    }
    let calls = stream.chunks().filter(|c| c["choices"][0]["delta"]["tool_calls"].is_array()).count();
    assert_eq!(calls, 2, "{}", stream.raw);
    assert!(stream.raw.contains("\"finish_reason\":\"tool_calls\""), "{}", stream.raw);
    let (status, reply) = house.chat(&body);
    assert_eq!(status, 400);
    assert!(reply["error"]["message"].as_str().unwrap().contains("no such tool"), "{reply}");
}

#[test]
fn what_no_node_of_our_own_can_take_spills_and_what_is_private_does_not() {
    let house = House::open(&["--model", PACED], vec![Script::chat(&["spilt"])], "");
    // All slots are taken, twice over: nobody waits on top of that.
    let mut background = ask("null", &[]);
    (background["max_tokens"], background["ignore_eos"]) = (2000.into(), true.into());
    let busy: Vec<Stream> = (0..16).map(|_| house.stream(&background)).collect();
    std::thread::sleep(Duration::from_millis(800));
    let (_, reply) = house.chat(&ask("null", &["mock/m"]));
    assert_eq!(reply["weir"]["nodes"], json!(["mock/m"]), "{reply}");
    assert_eq!(reply["choices"][0]["message"]["content"], "spilt", "{reply}");
    let mut private = ask("null", &["mock/m"]);
    private["weir"]["tags"] = json!({ "private": "yes" });
    let waits = house.stream(&private);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(house.mock.seen().len(), 1, "what is private waits for a node of our own");
    drop(busy);
    let (text, ran) = waits.end();
    assert!(!text.is_empty() && ran["nodes"] != json!(["mock/m"]), "{ran}");
    private["model"] = "mock/m".into();
    private["weir"]["otherwise"] = json!([]);
    let (status, reply) = house.chat(&private);
    assert_eq!(status, 400, "{reply}");
    assert!(reply["error"]["message"].as_str().unwrap().contains("private"), "{reply}");
    assert_eq!(house.mock.seen().len(), 1);
    let (_, reply) = house.chat(&ask("null", &["mock/m"]));
    assert_ne!(reply["weir"]["nodes"], json!(["mock/m"]), "there is room again: {reply}");
}

#[test]
fn a_stream_whose_node_is_killed_goes_on_at_the_provider_with_what_it_has_said() {
    let listen = free_address().to_string();
    let script = Script::chat(&[" and ", "so on."]);
    let house = House::open(&["--no-node", "--listen", &listen], vec![script], "prefill = \"plain\"");
    let link = {
        let folder = tempfile::tempdir().unwrap();
        let state = house.folder.path().join("state");
        let out = weir(folder.path()).args(["link", "--state"]).arg(&state).output().unwrap();
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    let mut node = Node::join("attic", &link, PACED);
    let end = Instant::now() + Duration::from_secs(40);
    while !house.serve.get("/v1/models").unwrap().body.contains("\"null\"") {
        assert!(Instant::now() < end, "{}", node.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut body = ask("null", &["mock/m"]);
    (body["max_tokens"], body["ignore_eos"]) = (500.into(), true.into());
    let mut stream = house.stream(&body);
    stream.read(20);
    node.kill();
    let (text, ran) = stream.end();
    assert_eq!(ran["nodes"], json!(["attic", "mock/m"]), "{ran}");
    let sent = house.mock.seen();
    let messages = sent[0].body["messages"].as_array().unwrap();
    assert_eq!((messages.len(), &messages[1]["role"]), (2, &json!("assistant")), "{}", sent[0].body);
    let said = messages[1]["content"].as_str().unwrap();
    assert_eq!(text, format!("{said} and so on."), "nothing is lost, and nothing said twice");
    assert!(ran["cost_usd"].as_f64().unwrap() > 0.0, "{ran}");
}

#[test]
fn a_provider_that_breaks_off_is_followed_by_a_node_of_our_own() {
    let cut = Script::chat(&["one ", "two ", "never"]).broken_after(2, Ending::Cut);
    let house = House::open(&["--model", "null"], vec![cut], "");
    let mut body = ask("mock/m", &["null"]);
    (body["max_tokens"], body["ignore_eos"]) = (12.into(), true.into());
    let (text, ran) = house.stream(&body).end();
    assert!(text.starts_with("one two ") && text.len() > 8 && !text.contains("never"), "{text}");
    assert_eq!(ran["nodes"].as_array().unwrap().len(), 2, "{ran}");
    assert_eq!((&ran["nodes"][0], &ran["cost_estimated"]), (&json!("mock/m"), &json!(true)), "{ran}");
    assert_eq!(house.mock.seen().len(), 1, "what it had begun isn't asked for twice");
}

#[test]
fn a_provider_that_has_enough_or_hangs_is_followed_by_a_node_of_our_own() {
    let mut busy = Script::error(429, "slow down");
    busy.headers.push(("retry-after", "2".into()));
    let dead = Script { dead: true, ..Script::error(200, "") };
    let house = House::open(&["--model", "null"], vec![busy, dead], "");
    let (_, reply) = house.chat(&ask("mock/m", &["null"]));
    assert_eq!((&reply["weir"]["cost_usd"], house.mock.seen().len()), (&json!(0.0), 1), "{reply}");
    assert_ne!(reply["weir"]["nodes"], json!(["mock/m"]), "{reply}");
    house.chat(&ask("mock/m", &["null"]));
    assert_eq!(house.mock.seen().len(), 1, "it isn't asked before it is time");
    std::thread::sleep(Duration::from_millis(2100));
    let started = Instant::now();
    let (status, reply) = house.chat(&ask("mock/m", &["null"]));
    assert_eq!((status, house.mock.seen().len()), (200, 2), "{reply}");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let cost = reply["weir"]["cost_usd"].as_f64().unwrap();
    assert!(
        cost > 0.0 && cost < 1e-4,
        "who hangs may have read the prompt, and that is reckoned with: {reply}"
    );
}
