//! A cluster at work: a scheduler, three nodes of which one dies, and a provider.
use super::{Running, ask, free_address, wait_for};
use crate::models;
use crate::run::{output, program, root};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Takes its time, so that there is a middle to interrupt.
const PACED: &str = "null:step_us=20000,vocab=1000";
/// A real model, since a made-up one reads no weights.
const MODEL: &str = "smollm2.gguf";
/// Of the request that loses its node.
pub const TRACE: &str = "5bd1e995a1b2c3d4e5f60718293a4b5c";

/// What runs.
pub struct Cluster {
    http: SocketAddr,
    metrics: Vec<SocketAddr>,
    nodes: Vec<(&'static str, Running)>,
    _others: Vec<Running>,
}

impl Cluster {
    /// Starts it; traces go to `collector`.
    pub fn start(folder: &Path, collector: &str) -> Result<Cluster> {
        let (provider, http, listen) = (free_address()?, free_address()?, free_address()?);
        let metrics = vec![free_address()?, free_address()?, free_address()?];
        let asked = weir(folder, "provider", &[])
            .args(["serve", "--model", "null", "--key", "sk-provider", "--http", &provider.to_string()])
            .spawn()?;
        let config = folder.join("weir.toml");
        let models = "models = [{ name = \"null\", context = 4000, usd_per_mtok = { prompt = 100.0, output = 200.0 } }]";
        std::fs::write(folder.join("key"), "sk-provider\n")?;
        let key = folder.join("key");
        std::fs::write(
            &config,
            format!(
                "[[provider]]\nname = \"cloud\"\nurl = \"http://{provider}\"\nkey_file = {key:?}\n{models}\n"
            ),
        )?;
        let state = folder.join("state");
        let otlp = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
            ("OTEL_METRICS_EXPORTER", "none"),
            ("OTEL_BSP_SCHEDULE_DELAY", "200"),
        ];
        let mut scheduler = weir(folder, "weir", &otlp);
        scheduler.arg("--config").arg(&config).args(["serve", "--no-node", "--http", &http.to_string()]);
        scheduler
            .args(["--listen", &listen.to_string(), "--metrics", &metrics[0].to_string(), "--state"])
            .arg(&state);
        let others = vec![Running(asked), Running(scheduler.spawn()?)];
        wait_for("the gateway", Duration::from_secs(30), || ask(http, "GET", "/healthz", "", "").is_ok())?;
        let link = output(program(binary()).args(["link", "--uses", "3", "--state"]).arg(&state))?;
        let file = models::folder()?.join(MODEL);
        let file = file.to_str().context("a path that is text")?;
        let mut nodes = Vec::new();
        for (name, model, at) in [("a", PACED, Some(1)), ("b", PACED, None), ("real", file, Some(2))] {
            let mut node = weir(folder, name, &otlp);
            node.args(["join", link.trim(), "--name", name, "--model", model, "--state"])
                .arg(folder.join(format!("node-{name}")));
            if let Some(at) = at {
                node.args(["--metrics", &metrics[at].to_string()]);
            }
            nodes.push((name, Running(node.spawn()?)));
        }
        let cluster = Cluster { http, metrics, nodes, _others: others };
        wait_for("three nodes", Duration::from_secs(120), || {
            cluster.nodes().is_ok_and(|nodes| {
                nodes.iter().filter(|n| n["id"].is_string() && n["models"][0].is_object()).count() >= 3
            })
        })?;
        Ok(cluster)
    }

    /// Where Prometheus finds metrics: the scheduler first.
    pub fn scraped(&self) -> Vec<SocketAddr> {
        self.metrics.clone()
    }

    fn nodes(&self) -> Result<Vec<Value>> {
        let (_, body) = ask(self.http, "GET", "/weir/v1/nodes", "", "")?;
        let nodes: Value = serde_json::from_str(&body)?;
        Ok(nodes["nodes"].as_array().cloned().unwrap_or_default())
    }

    fn chat(&self, model: &str, more: &Value, headers: &str) -> Result<u16> {
        let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": "Why is the sky blue?" }], "max_tokens": 12 });
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        Ok(ask(self.http, "POST", "/v1/chat/completions", headers, &body.to_string())?.0)
    }

    /// Traffic of all kinds for so long; the trace of a request that lost its node.
    pub fn work(&mut self, time: Duration) -> Result<String> {
        let models = {
            let (_, body) = ask(self.http, "GET", "/v1/models", "", "")?;
            let listed: Value = serde_json::from_str(&body)?;
            let names = listed["data"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|m| Some(m["id"].as_str()?.to_owned()));
            names.collect::<Vec<_>>()
        };
        let began = Instant::now();
        let mut round = 0;
        while began.elapsed() < time {
            std::thread::scope(|scope| {
                let cluster = &*self;
                for model in &models {
                    scope.spawn(move || cluster.chat(model, &json!({ "stream": round % 2 == 0 }), ""));
                }
                scope.spawn(move || {
                    cluster.chat("null", &json!({ "weir": { "ttft_ms": 1 }, "max_tokens": 2 }), "")
                });
                scope.spawn(move || cluster.chat("no-such-model", &json!({}), ""));
            });
            round += 1;
            if round == 4 {
                self.lose_a_node()?;
            }
        }
        println!("{round} rounds of requests for {}", models.join(", "));
        Ok(TRACE.to_owned())
    }

    /// Kills the node of a request that is under way, which goes on elsewhere.
    fn lose_a_node(&mut self) -> Result<()> {
        let mut lost = None;
        let headers = format!("traceparent: 00-{TRACE}-00000000000000bb-01\r\n");
        std::thread::scope(|scope| {
            let cluster = &*self;
            let asked = scope
                .spawn(move || cluster.chat("null", &json!({ "max_tokens": 100, "stream": true }), &headers));
            wait_for("a node at work", Duration::from_secs(20), || {
                let is_busy = |node: &Value| {
                    ["a", "b"].contains(&node["name"].as_str()?).then(|| node["models"][0]["running"] == 1)
                };
                let busy = cluster
                    .nodes()
                    .ok()
                    .and_then(|nodes| nodes.iter().find(|n| is_busy(n) == Some(true)).cloned());
                lost = busy.and_then(|node| Some(node["name"].as_str()?.to_owned()));
                lost.is_some()
            })?;
            std::thread::sleep(Duration::from_millis(400));
            let name = lost.clone().unwrap_or_default();
            if let Some((_, node)) = cluster.nodes.iter().find(|(known, _)| *known == name) {
                check_kill(node)?;
            }
            let status = asked.join().map_err(|_| anyhow::anyhow!("asking panicked"))??;
            ensure!(status == 200, "the request that lost its node got {status}");
            anyhow::Ok(())
        })?;
        self.nodes.retain(|(name, _)| lost.as_deref() != Some(*name));
        Ok(())
    }
}

fn check_kill(node: &Running) -> Result<()> {
    output(program("kill").args(["-KILL", &node.0.id().to_string()])).map(drop)
}

fn binary() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), PathBuf::from)
        .join("debug/weir")
}

/// The program, with nothing of this machine's configuration.
fn weir(folder: &Path, name: &str, environment: &[(&str, &str)]) -> Command {
    let mut command = program(binary());
    let log = File::create(folder.join(format!("{name}.log")));
    command.current_dir(folder).env("XDG_CONFIG_HOME", folder).stdin(Stdio::null()).stdout(Stdio::null());
    command.envs(environment.iter().copied()).stderr(log.map_or(Stdio::null(), Stdio::from));
    command
}
