//! What leaves a cluster, by processes: one trace a request, whoever takes part; metrics; log lines. Never a prompt.
use super::cluster::House as Cluster;
use crate::mock::{Mock, Script};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use weir_tests::{Collector, Connection, Node, Serve, Span, free_address, weir};

const PACED: &str = "null:step_us=20000,vocab=1000";
/// Said by the client, and by nobody else.
const SECRET: &str = "xylophone-quagmire";

fn only<'a>(spans: &'a [Span], what: &str, is: impl Fn(&Span) -> bool) -> &'a Span {
    let found: Vec<&Span> = spans.iter().filter(|span| is(span)).collect();
    assert_eq!(found.len(), 1, "{what} of {spans:#?}");
    found[0]
}

fn attribute<'a>(span: &'a Span, name: &str) -> &'a str {
    span.attributes.get(name).map_or("", String::as_str)
}

/// A scheduler with a provider, two nodes, and a collector for all three.
struct House {
    serve: Serve,
    nodes: BTreeMap<String, Node>,
    mock: Mock,
    collector: Collector,
    metrics: BTreeMap<&'static str, SocketAddr>,
    _state: tempfile::TempDir,
}

impl House {
    fn open(scripts: Vec<Script>) -> House {
        let (collector, mock, state) =
            (Collector::start(), Mock::start(scripts), tempfile::tempdir().unwrap());
        let models =
            "models = [{ name = \"m\", context = 4000, usd_per_mtok = { prompt = 1.0, output = 2.0 } }]";
        let (key, config) = (state.path().join("key"), state.path().join("weir.toml"));
        std::fs::write(&key, "sk-secret-123\n").unwrap();
        let url = &mock.url;
        let text = format!("[[provider]]\nname = \"mock\"\nurl = \"{url}\"\nkey_file = {key:?}\n{models}\n");
        std::fs::write(&config, text).unwrap();
        let folder = state.path().join("state");
        let (listen, config) = (free_address().to_string(), config.to_str().unwrap().to_owned());
        let arguments =
            ["--no-node", "--listen", &listen, "--state", folder.to_str().unwrap(), "--log-format", "json"];
        let mut environment = collector.environment().to_vec();
        environment.extend([("WEIR_CONFIG", config.as_str()), ("WEIR_LOG", "debug")]);
        let serve = Serve::start(&arguments, &environment);
        let link = {
            let folder = tempfile::tempdir().unwrap();
            let mut command = weir(folder.path());
            command.args(["link", "--uses", "2", "--state"]).arg(state.path().join("state"));
            String::from_utf8(command.output().unwrap().stdout).unwrap().trim().to_owned()
        };
        let mut metrics = BTreeMap::new();
        let mut nodes = BTreeMap::new();
        for name in ["a", "b"] {
            let mut environment = collector.environment().to_vec();
            environment.push(("WEIR_LOG", "debug"));
            let at = free_address();
            let flags = ["--model", PACED, "--metrics", &at.to_string()];
            nodes.insert(name.to_owned(), Node::join_with(name, &link, &flags, &environment));
            metrics.insert(name, at);
        }
        let house = House { serve, nodes, mock, collector, metrics, _state: state };
        house.wait_for("both nodes are here", |nodes| {
            nodes.iter().filter(|n| n["models"][0]["name"] == "null").count() == 2
        });
        house
    }

    fn wait_for(&self, what: &str, is: impl Fn(&[Value]) -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !is(self.serve.get("/weir/v1/nodes").unwrap().json()["nodes"].as_array().unwrap()) {
            assert!(Instant::now() < end, "{what}: {}", self.serve.stderr());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ask(&self, model: &str, trace: &str) -> Connection {
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": SECRET }], "max_tokens": 60, "stream": true });
        let headers = format!("traceparent: 00-{trace}-00000000000000aa-01\r\n");
        Connection::open_as(self.serve.address, "POST", "/v1/chat/completions", &body.to_string(), &headers)
            .unwrap()
    }
}

#[test]
fn a_request_is_one_trace_whoever_takes_part() {
    let mut house = House::open(vec![Script::chat(&["It ", "scatters."])]);
    let first = "0af7651916cd43dd8448eb211c80319c";
    let mut stream = house.ask("null", first);
    let mut text = String::new();
    while text.matches("data: ").count() < 8 {
        text += &stream.some().unwrap();
    }
    let nodes = house.serve.get("/weir/v1/nodes").unwrap().json();
    let busy = nodes["nodes"].as_array().unwrap().iter().find(|n| n["models"][0]["running"] == 1).unwrap();
    let killed = busy["name"].as_str().unwrap().to_owned();
    house.nodes.get_mut(&killed).unwrap().kill();
    let rest = stream.rest().unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    let survivor = if killed == "a" { "b" } else { "a" };

    // Gateway, scheduler, an attempt that failed, one that went on, the node, and two of its device.
    let spans = house.collector.trace(first, 7);
    assert_eq!(spans.len(), 7, "{spans:#?}");
    let root = only(&spans, "the gateway's span", |s| s.name == "POST /v1/chat/completions");
    assert_eq!(
        (root.parent.as_str(), root.kind, attribute(root, "http.response.status_code")),
        ("00000000000000aa", 2, "200")
    );
    assert_eq!(root.resource["service.name"], "weir");
    let schedule = only(&spans, "the scheduler's span", |s| s.name == "weir.schedule");
    assert_eq!(schedule.parent, root.id);
    let events: Vec<&str> = schedule.events.iter().map(String::as_str).collect();
    // Its link broke, or it was silent for too long: whichever is seen first.
    assert!(
        matches!(*events, ["weir.placed", "weir.attempt_failed" | "weir.attempt_left", "weir.resumed"]),
        "{events:?}"
    );
    let attempt = |node: &str| {
        only(&spans, "an attempt", |s| s.name == "chat null" && attribute(s, "weir.node.name") == node)
    };
    let (failed, resumed) = (attempt(&killed), attempt(survivor));
    assert!(!attribute(failed, "error.type").is_empty() && !resumed.failed);
    for attempt in [failed, resumed] {
        assert_eq!((attempt.parent.as_str(), attempt.kind), (schedule.id.as_str(), 3));
        assert_eq!(attribute(attempt, "gen_ai.provider.name"), "weir");
        assert_eq!(attribute(attempt, "gen_ai.operation.name"), "chat");
        assert_eq!(attribute(attempt, "gen_ai.request.model"), "null");
    }
    let given: u32 = attribute(resumed, "weir.tokens.given").parse().unwrap();
    let output: u32 = attribute(resumed, "gen_ai.usage.output_tokens").parse().unwrap();
    assert_eq!((given > 0, given + output), (true, 60));
    let node = only(&spans, "the node's span", |s| s.name == "weir.node");
    assert_eq!((node.parent.as_str(), node.kind), (resumed.id.as_str(), 2));
    assert_eq!(
        (node.resource["service.name"].as_str(), node.resource["service.instance.id"].as_str()),
        ("weir-node", survivor)
    );
    for name in ["weir.prefill", "weir.decode"] {
        let device = only(&spans, name, |s| s.name == name);
        assert_eq!(device.parent, node.id);
        assert!(
            device.start >= node.start && device.end <= node.end + 1_000_000,
            "{device:?} within {node:?}"
        );
    }
    assert!(spans.iter().all(|s| s.start <= s.end && s.start > 1_600_000_000_000_000_000));

    let second = "1af7651916cd43dd8448eb211c80319d";
    assert!(house.ask("mock/m", second).rest().unwrap().contains("scatters"));
    let spans = house.collector.trace(second, 3);
    let call = only(&spans, "the provider's span", |s| s.name == "chat m");
    assert_eq!(call.kind, 3);
    for (name, value) in [
        ("gen_ai.provider.name", "mock"),
        ("server.address", "127.0.0.1"),
        ("gen_ai.usage.input_tokens", "10"),
        ("gen_ai.usage.output_tokens", "2"),
        ("gen_ai.response.finish_reasons", "stop"),
    ] {
        assert_eq!(attribute(call, name), value, "{name} of {call:?}");
    }
    let seen = house.mock.seen();
    assert_eq!(seen[0].headers["traceparent"], format!("00-{second}-{}-01", call.id));
    let schedule = only(&spans, "the scheduler's span", |s| s.name == "weir.schedule");
    assert_eq!(
        (schedule.events.as_slice(), attribute(schedule, "weir.cost_usd")),
        (["weir.placed".to_owned()].as_slice(), "0.000014")
    );

    check_metrics(&house, survivor);
    check_silence(&house);
}

/// `/metrics` of the gateway, and of a node on its own address.
fn check_metrics(house: &House, survivor: &str) {
    let reply = house.serve.get("/metrics").unwrap();
    assert_eq!(reply.status, 200);
    let values = parse(&reply.body);
    let value = |name: &str| *values.get(name).unwrap_or_else(|| panic!("{name} of {values:#?}"));
    assert_eq!(
        value(
            "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"weir\",gen_ai_request_model=\"null\"}"
        ),
        1.0
    );
    assert_eq!(
        value(
            "gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"mock\",gen_ai_request_model=\"mock/m\"}"
        ),
        1.0
    );
    assert_eq!(
        value(
            "gen_ai_client_token_usage_sum{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"mock\",gen_ai_request_model=\"m\",gen_ai_token_type=\"input\"}"
        ),
        10.0
    );
    assert_eq!(value(&format!("weir_placements_total{{node=\"{survivor}\",kind=\"resumed\"}}")), 1.0);
    assert_eq!(value("weir_responses_total{route=\"/v1/chat/completions\",status=\"200\"}"), 2.0);
    assert!((value("weir_provider_cost_usd_total{provider=\"mock\",model=\"m\"}") - 14e-6).abs() < 1e-12);
    assert_eq!(value(&format!("weir_node_up{{node=\"{survivor}\",trust=\"own\"}}")), 1.0);
    assert!(value(&format!("weir_node_tokens_total{{node=\"{survivor}\",model=\"null\"}}")) > 10.0);
    assert_eq!((value("weir_queue_waiting"), value("weir_telemetry_dropped_total")), (0.0, 0.0));
    let at = house.metrics[survivor];
    let own = parse(&Connection::open(at, "GET", "/metrics", "").unwrap().reply().unwrap().body);
    assert!(own["weir_engine_tokens_total{model=\"null\"}"] > 10.0, "{own:?}");
    assert_eq!(Connection::open(at, "GET", "/", "").unwrap().reply().unwrap().status, 404);
    // They are sent now and then.
    let is_sent = |body: &Vec<u8>| String::from_utf8_lossy(body).contains("gen_ai.server.request.duration");
    let end = Instant::now() + Duration::from_secs(20);
    while !house.collector.bodies("/v1/metrics").iter().any(is_sent) {
        assert!(Instant::now() < end, "{} times", house.collector.bodies("/v1/metrics").len());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Nothing that was said is told: not to the collector, not in a log line. Lines about a request carry its trace.
fn check_silence(house: &House) {
    let body = json!({ "model": "null", "messages": [{ "role": "user", "content": SECRET }], "max_tokens": -1, SECRET: [] });
    let headers = "traceparent: 00-2af7651916cd43dd8448eb211c80319e-00000000000000aa-01\r\n";
    let refused = house.serve.post_as("/v1/chat/completions", &body.to_string(), headers).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let mut told: Vec<String> = house.nodes.values().map(Node::stderr).collect();
    told.push(house.serve.stderr());
    for path in ["/v1/traces", "/v1/metrics"] {
        told.extend(
            house.collector.bodies(path).iter().map(|body| String::from_utf8_lossy(body).into_owned()),
        );
    }
    told.push(house.serve.get("/metrics").unwrap().body);
    assert!(told.iter().all(|text| !text.contains(SECRET) && !text.contains("sk-secret")), "{refused:?}");
    let stderr = house.serve.stderr();
    let lines: Vec<Value> = stderr
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    let of_trace = |line: &Value| line["span"]["trace_id"] == "2af7651916cd43dd8448eb211c80319e";
    assert!(lines.iter().any(of_trace), "{stderr}");
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{stderr}");
}

/// Values by name and labels; fails on what Prometheus wouldn't take.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    // Chunk sizes are no part of it: the body is whole.
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            if let Some((name, kind)) = comment.strip_prefix("TYPE ").and_then(|told| told.split_once(' ')) {
                assert!(kinds.insert(name, kind).is_none(), "{name} is told twice");
                assert!(kind != "counter" || name.ends_with("_total"), "{name}");
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let bare = name.split('{').next().unwrap();
        let is_of = |suffix: &str| {
            bare.strip_suffix(suffix).is_some_and(|name| kinds.get(name) == Some(&"histogram"))
        };
        assert!(kinds.contains_key(bare) || ["_bucket", "_sum", "_count"].into_iter().any(is_of), "{line}");
        let value: f64 = value.parse().unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(values.insert(name.to_owned(), value).is_none(), "{name} twice");
    }
    values
}

#[test]
fn a_dead_collector_costs_one_warning() {
    let dead = free_address().to_string();
    let url = format!("http://{dead}");
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "50"),
    ];
    let mut serve = Serve::start(&["--model", "null"], &environment);
    let body = json!({ "model": "null", "prompt": "x", "max_tokens": 2 }).to_string();
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(serve.post("/v1/completions", &body).unwrap().status, 200);
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    std::thread::sleep(Duration::from_millis(1500));
    let said = serve.stderr();
    assert_eq!(said.matches("telemetry can't be sent").count(), 1, "{said}");
    serve.signal("TERM");
    assert!(serve.ended(Duration::from_secs(8)).success());
}

#[test]
fn metrics_take_a_key_where_others_do() {
    let cluster = Cluster::open();
    assert_eq!(cluster.serve().get("/metrics").unwrap().status, 200);
    let serve = Serve::start(&["--model", "null", "--key", "k123"], &[]);
    assert_eq!(serve.get("/metrics").unwrap().status, 401);
    let reply = Connection::open_as(serve.address, "GET", "/metrics", "", "authorization: Bearer k123\r\n");
    assert_eq!(reply.unwrap().reply().unwrap().status, 200);
}
