//! API keys and budgets, by processes: who may ask and for what; that no budget is passed, by however many at once and
//! however often the process is killed.
use crate::mock::{Mock, Script};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use weir_tests::{Connection, Serve, weir};

/// What the provider charges for each answer, in billionths of a dollar: 10 tokens of prompt, 2 of output.
const COST: u64 = 10 * 1000 + 2 * 2000;
/// And what is reserved: four times the 6 tokens that we think "Why?" has, and 40 of output.
const WORST: u64 = 4 * 6 * 1000 + 40 * 2000;

/// A state folder, a provider that costs, and a configuration that names it.
struct Place {
    folder: TempDir,
    mock: Mock,
}

impl Place {
    fn new(pause: Duration) -> Place {
        let mock = Mock::start(vec![Script::chat(&["It ", "scatters."]).slow(pause)]);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("key"), "sk-secret-123\n").unwrap();
        let (url, key) = (&mock.url, folder.path().join("key"));
        let models =
            "models = [{ name = \"m\", context = 4000, usd_per_mtok = { prompt = 1.0, output = 2.0 } }]";
        let text = format!(
            "[[provider]]\nname = \"mock\"\nurl = \"{url}\"\nslots = 200\nkey_file = {key:?}\n{models}\n"
        );
        std::fs::write(folder.path().join("weir.toml"), text).unwrap();
        Place { folder, mock }
    }

    fn state(&self) -> String {
        self.folder.path().join("state").to_str().unwrap().to_owned()
    }

    fn serve(&self, more: &[&str]) -> Serve {
        let (state, config) = (self.state(), self.folder.path().join("weir.toml"));
        let arguments = [&["--state", &state], more].concat();
        Serve::start(&arguments, &[("WEIR_CONFIG", config.to_str().unwrap())])
    }

    /// What a command says on stdout.
    fn run(&self, arguments: &[&str]) -> String {
        let out = weir(self.folder.path()).args(arguments).args(["--state", &self.state()]).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "weir {arguments:?}: {stderr}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// A new key.
    fn key(&self, arguments: &[&str]) -> String {
        let said = self.run(&[&["key", "add"], arguments].concat());
        assert!(said.starts_with("sk-weir-") && said.lines().count() == 1, "nothing but the key: {said}");
        said.trim().to_owned()
    }

    /// What the books say of the first limit of the first key: spent, and reserved.
    fn books(&self) -> (u64, u64) {
        let keys: Value = serde_json::from_str(&self.run(&["key", "list", "--json"])).unwrap();
        let limit = &keys[0]["limits"][0];
        (limit["spent"].as_u64().unwrap(), limit["reserved"].as_u64().unwrap())
    }

    /// What the provider has charged.
    fn charged(&self) -> u64 {
        self.mock.seen().len() as u64 * COST
    }
}

fn body(model: &str) -> String {
    json!({ "model": model, "messages": [{ "role": "user", "content": "Why?" }], "max_tokens": 40 })
        .to_string()
}

/// The answer's status, its headers and its body.
fn ask(serve: &Serve, key: &str, model: &str) -> std::io::Result<(u16, String, Value)> {
    let headers = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
    let asked = Connection::open_as(serve.address, "POST", "/v1/chat/completions", &body(model), &headers)?;
    let text = asked.rest()?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok((status, head.to_owned(), serde_json::from_str(body).unwrap_or_default()))
}

#[test]
fn keys_open_what_they_are_for_and_nothing_once_they_are_revoked() {
    let place = Place::new(Duration::ZERO);
    let policy = place.folder.path().join("policy.toml");
    std::fs::write(&policy, "[[deny]]\nname = 'not bob'\nwhen = 'request.key == \"bob\"'\nthat = 'true'")
        .unwrap();
    let serve = place.serve(&["--model", "null", "--policy", policy.to_str().unwrap()]);
    let status = |key: &str, model: &str| {
        let (status, _, body) = ask(&serve, key, model).unwrap();
        (status, body["error"]["message"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(status("", "null").0, 200, "without any key there is none to ask for");
    let alice = place.key(&["alice", "--model", "null", "--tag", "team=red"]);
    assert_eq!(status("", "null").0, 401);
    assert_eq!(status("sk-weir-wrong", "null").0, 401);
    assert_eq!(status(&alice, "null").0, 200);
    let header = format!("x-api-key: {alice}\r\n");
    assert_eq!(serve.post_as("/v1/chat/completions", &body("null"), &header).unwrap().status, 200);
    let (refused, why) = status(&alice, "mock/m");
    assert!(refused == 403 && why.contains("may use: null"), "{why}");
    assert!(place.mock.seen().is_empty());
    let bob = place.key(&["bob"]);
    let (refused, why) = status(&bob, "null");
    assert!(refused == 400 && why.contains("not bob"), "policies know keys by their names: {why}");
    let brief = place.key(&["brief", "--expires", "1s"]);
    std::thread::sleep(Duration::from_millis(1100));
    assert!(status(&brief, "null").1.contains("expired"));
    place.run(&["key", "revoke", "alice"]);
    assert!(status(&alice, "null").1.contains("revoked"));
    let used: Value = serde_json::from_str(&place.run(&["usage", "--by", "tag", "--json"])).unwrap();
    assert_eq!((&used[1]["name"], &used[1]["requests"]), (&json!("team=red"), &json!(2)), "{used}");
    drop(serve);
    let keys: Value = serde_json::from_str(&place.run(&["key", "list", "--json"])).unwrap();
    let states: Vec<&str> = keys.as_array().unwrap().iter().map(|k| k["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["revoked", "good", "expired"], "without a scheduler that runs, too: {keys}");
    assert!(!keys.to_string().contains("sk-weir"));
    assert!(
        place.run(&["usage", "--csv"]).starts_with("key,requests,failed,prompt_tokens,output_tokens,usd\n")
    );
}

#[test]
fn rates_are_kept_and_said() {
    let place = Place::new(Duration::ZERO);
    let key = place.key(&["alice", "--rate", "2/minute"]);
    let serve = place.serve(&["--model", "null"]);
    // A minute may end in between.
    let mut answers: Vec<_> = (0..5).map(|_| ask(&serve, &key, "null").unwrap()).collect();
    let (status, head, body) = answers.pop().unwrap();
    let after = head.lines().find_map(|line| line.strip_prefix("retry-after: ")).unwrap();
    assert!((1..=60).contains(&after.trim().parse::<u64>().unwrap()), "{head}");
    assert_eq!((status, &body["error"]["code"]), (429, &json!("rate_limit_exceeded")), "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("2 requests in any minute"), "{body}");
    assert_eq!(answers[0].0, 200);
}

#[test]
fn five_hundred_at_once_do_not_pass_a_budget_with_room_for_fifty() {
    let place = Place::new(Duration::from_millis(20));
    let limit = 50 * WORST;
    let key = place.key(&["alice", "--budget", &format!("0.{limit:09}usd/month")]);
    let serve = place.serve(&["--no-node"]);
    let (good, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..500 {
            scope.spawn(|| {
                let (status, _, body) = ask(&serve, &key, "mock/m").unwrap();
                match status {
                    200 => {
                        assert_eq!(body["choices"][0]["message"]["content"], "It scatters.", "{body}");
                        good.fetch_add(1, Ordering::SeqCst);
                    }
                    429 => {
                        assert_eq!(body["error"]["type"], "insufficient_quota", "{body}");
                        let why = body["error"]["message"].as_str().unwrap();
                        assert!(
                            why.contains("are left") && why.contains("the next month begins in"),
                            "{why}"
                        );
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                    _ => panic!("{status}: {body}"),
                }
            });
        }
    });
    let (good, refused) = (good.into_inner() as u64, refused.into_inner() as u64);
    println!("{good} answered, {refused} refused; {} of {limit} spent", place.charged());
    assert!(good >= 50 && good + refused == 500);
    assert_eq!(place.charged(), good * COST, "what was refused was not sent");
    assert!(place.charged() <= limit);
    assert_eq!(place.books(), (place.charged(), 0), "exact once all have ended");
    let used: Value = serde_json::from_str(&place.run(&["usage", "--json"])).unwrap();
    assert_eq!(
        (&used[0]["requests"], &used[0]["nano_usd"]),
        (&json!(good), &json!(place.charged())),
        "{used}"
    );
}

/// Requests that are sent one after the other by so many clients until the process is killed.
const CLIENTS: usize = 24;
/// What ended so shortly before a death may not have been settled.
const UNSETTLED: Duration = Duration::from_millis(250);

/// How many clients had no answer yet when it was killed, or had one just before.
fn until_killed(serve: &Serve, key: &str, after: Duration) -> u64 {
    let (begun, in_flight) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut last = Duration::ZERO;
                loop {
                    match ask(serve, key, "mock/m") {
                        Ok((200, ..)) => last = begun.elapsed(),
                        Ok((429, ..)) => std::thread::sleep(Duration::from_millis(20)),
                        // It is dead.
                        _ => break,
                    }
                }
                let recent = usize::from(last + UNSETTLED > after);
                in_flight.fetch_add(1 + recent * (UNSETTLED.as_millis() / 60) as usize, Ordering::SeqCst);
            });
        }
        std::thread::sleep(after);
        serve.signal("KILL");
    });
    in_flight.into_inner() as u64
}

fn check_killed(seed: u64) {
    let place = Place::new(Duration::from_millis(15));
    let limit = 60 * WORST;
    let key = place.key(&["alice", "--budget", &format!("0.{limit:09}usd/month")]);
    let (mut random, mut in_flight) = (seed, 0);
    for _ in 0..3 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let serve = place.serve(&["--no-node"]);
        in_flight += until_killed(&serve, &key, Duration::from_millis(100 + (random >> 33) % 600));
        drop(serve);
        let (spent, reserved) = place.books();
        let charged = place.charged();
        println!(
            "seed {seed}: charged {charged}, books {spent}, at most {in_flight} in flight at a death, limit {limit}"
        );
        assert_eq!(reserved, 0, "what was in flight is spent");
        assert!(charged <= spent, "seed {seed}: what is spent is in the books");
        assert!(
            spent <= charged + in_flight * WORST,
            "seed {seed}: and not more than what was in flight beside it"
        );
        assert!(spent <= limit, "seed {seed}");
    }
    let before = place.books().0;
    let serve = place.serve(&["--no-node"]);
    let mut good = 0;
    for _ in 0..10 {
        good += u64::from(ask(&serve, &key, "mock/m").unwrap().0 == 200);
    }
    let (spent, reserved) = place.books();
    assert_eq!((spent, reserved), (before + good * COST, 0), "seed {seed}: exact again");
    assert!(place.charged() <= spent && spent <= limit, "seed {seed}: {spent} of {limit}");
}

#[test]
fn a_budget_holds_however_often_the_process_is_killed() {
    (0..3).for_each(check_killed);
}
