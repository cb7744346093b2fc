//! A provider that nobody here wrote, `llmock`, told to fail in every way that it knows: each time the right behaviour, one
//! clear message, nothing said twice, and nothing asked for twice that may have been charged for.
use super::sdk::{prepared, run};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weir_tests::{Connection, Serve, free_address, skip};

const KEY: &str = "sk-secret-llmock";
/// What it answers, and how its stream is cut into pieces.
const ANSWER: &str = "The short waves of light are scattered most.";

/// A running `llmock`; killed when dropped.
struct Llmock {
    address: SocketAddr,
    child: Child,
}

impl Drop for Llmock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Llmock {
    fn start() -> Option<Llmock> {
        let program = installed()?;
        let address = free_address();
        let mut command = Command::new(program);
        command.args(["serve", "--host", "127.0.0.1", "--port", &address.port().to_string()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mock = Llmock { address, child };
        let end = Instant::now() + Duration::from_secs(60);
        while mock.call("GET", "/_llmock/requests", "").is_none() {
            assert!(Instant::now() < end, "llmock doesn't answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(mock)
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Option<Value> {
        let reply = Connection::open(self.address, method, path, body).ok()?.reply().ok()?;
        (reply.status / 100 == 2).then(|| reply.json())
    }

    /// What it does with what comes next, besides answering [`ANSWER`].
    fn expect(&self, behaviours: &[Value]) {
        self.call("DELETE", "/_llmock/scenario", "").unwrap();
        let reply = json!({ "type": "reply", "text": ANSWER, "times": null });
        let all: Vec<&Value> = behaviours.iter().chain([&reply]).collect();
        self.call("POST", "/_llmock/scenario", &json!({ "behaviors": all }).to_string()).unwrap();
    }

    /// How often it has been asked.
    fn asked(&self) -> u64 {
        self.call("GET", "/_llmock/requests", "").unwrap()["count"].as_u64().unwrap()
    }
}

fn installed() -> Option<PathBuf> {
    let venv = Command::new("python3").args(["-c", "import venv, ensurepip"]).output();
    if !venv.is_ok_and(|o| o.status.success()) {
        skip("python3 with venv is missing: apt-get install -y python3 python3-venv");
        return None;
    }
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk/llmock/requirements.txt");
    let folder = prepared("llmock", &requirements, |folder| {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder));
        let pip = folder.join("bin/pip");
        run(Command::new(pip).args(["install", "--quiet", "--requirement"]).arg(&requirements));
    });
    Some(folder.join("bin/llmock"))
}

struct House {
    serve: Serve,
    mock: Llmock,
    folder: tempfile::TempDir,
}

/// What comes of one request.
struct Outcome {
    status: u16,
    text: String,
    raw: String,
    asked: u64,
}

impl House {
    fn open() -> Option<House> {
        let (mock, folder) = (Llmock::start()?, tempfile::tempdir().unwrap());
        let key = folder.path().join("key");
        std::fs::write(&key, KEY).unwrap();
        let text = format!(
            "[[provider]]\nname = \"foreign\"\nurl = \"http://{}\"\nkey_file = {key:?}\nmodels = [{{ name = \"m\", context = \
             4000, usd_per_mtok = {{ prompt = 1.0, output = 2.0 }} }}]\n",
            mock.address
        );
        let config = folder.path().join("weir.toml");
        std::fs::write(&config, text).unwrap();
        let serve = Serve::start(&["--no-node"], &[("WEIR_CONFIG", config.to_str().unwrap())]);
        Some(House { serve, mock, folder })
    }

    /// Streams an answer to this question, which nobody else asks.
    fn stream(&self, question: &str, options: &Value) -> Outcome {
        let before = self.mock.asked();
        let message = json!({ "role": "user", "content": question });
        let mut body =
            json!({ "model": "foreign/m", "messages": [message], "max_tokens": 40, "stream": true });
        body["weir"] = options.clone();
        let mut open =
            Connection::open(self.serve.address, "POST", "/v1/chat/completions", &body.to_string()).unwrap();
        let mut raw = String::new();
        loop {
            let some = open.some().unwrap();
            if some.is_empty() {
                break;
            }
            raw += &some;
        }
        let status = raw.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let chunks =
            raw.lines().filter_map(|l| serde_json::from_str::<Value>(l.strip_prefix("data: ")?).ok());
        let text =
            chunks.filter_map(|c| Some(c["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
        assert!(!raw.contains(KEY), "{raw}");
        Outcome { status, text, raw, asked: self.mock.asked() - before }
    }

    /// It answers again, however long it had to rest.
    fn is_well(&self, question: &str) {
        self.mock.expect(&[]);
        let end = Instant::now() + Duration::from_secs(20);
        for n in 0.. {
            let outcome = self.stream(&format!("{question}, again {n}"), &json!({}));
            if outcome.status == 200 && outcome.text == ANSWER {
                return;
            }
            assert!(Instant::now() < end, "{}", outcome.raw);
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

#[test]
fn a_foreign_provider_that_fails_in_every_way_is_dealt_with() {
    let Some(house) = House::open() else { return };
    let fail = |status: u16, times: u32| json!({ "type": "fail", "status": status, "times": times });
    let fault =
        |kind: &str| json!({ "type": "stream_fault", "kind": kind, "after_chunks": 4, "stall_seconds": 1.5 });
    let check = |behaviour: Value, status: u16, text: &str, says: &str, asked: u64| {
        let question = format!("Why? {behaviour}");
        house.mock.expect(&[behaviour]);
        let outcome = house.stream(&question, &json!({ "ttft_ms": 3000 }));
        let Outcome { raw, .. } = &outcome;
        assert_eq!((outcome.status, outcome.text.as_str()), (status, text), "{question}: {raw}");
        assert!(raw.contains(says) && (says.is_empty() || raw.contains("foreign")), "{question}: {raw}");
        assert_eq!(outcome.asked, asked, "{question}: {raw}");
        assert_eq!(raw.contains("[DONE]"), text == ANSWER, "{question}: {raw}");
        house.is_well(&question);
    };
    check(fail(401, 1), 502, "", "refuses its key (401)", 1);
    check(fail(403, 1), 502, "", &house.folder.path().join("key").display().to_string(), 1);
    check(fail(400, 1), 400, "", "refuses the request (400)", 1);
    check(fail(500, 1), 200, ANSWER, "", 2);
    check(fail(502, 9), 502, "", "status 502", 3);
    check(json!({ "type": "delay", "seconds": 4 }), 504, "", "", 1);
    check(json!({ "type": "slow_first_token", "seconds": 1 }), 200, ANSWER, "", 1);
    // The first of four pieces names the speaker.
    check(fault("disconnect"), 200, "The short waves ", "broke off its answer", 1);
    check(fault("truncate"), 200, "The short waves ", "it ended without a reason", 1);
    check(fault("malformed"), 200, "The short waves ", "an event that is no JSON", 1);
    check(fault("stall"), 200, ANSWER, "", 1);
    let begun = Instant::now();
    check(json!({ "type": "fail", "status": 429, "retry_after": 1.5 }), 200, ANSWER, "", 2);
    assert!(begun.elapsed() > Duration::from_millis(1500), "{:?}", begun.elapsed());
    // By its own judgement, too; it can't see what we tell our client of a stream that was cut.
    let verdict = house.mock.call("GET", "/_llmock/verdict", "").unwrap().to_string();
    for finding in ["retry_after_ignored", "retried_non_retryable", "retry_storm", "no_backoff"] {
        assert!(!verdict.contains(finding), "{verdict}");
    }
    assert!(!house.serve.stderr().contains(KEY), "{}", house.serve.stderr());
}
