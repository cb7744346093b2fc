//! Phoenix: a receiver of OTLP that nobody here wrote, and its page for a trace.
use super::{Running, ask, free_address, wait_for};
use crate::run::{output, program, root, works};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

const PACKAGE: &str = "arize-phoenix";
/// Each span of the trace, and whose child it is.
const TREE: [(&str, &str); 6] = [
    ("weir.schedule", "POST /v1/chat/completions"),
    ("chat null", "weir.schedule"),
    ("chat null", "weir.schedule"),
    ("weir.node", "chat null"),
    ("weir.prefill", "weir.node"),
    ("weir.decode", "weir.node"),
];

/// Listens.
pub struct Phoenix {
    at: SocketAddr,
    _running: Running,
}

impl Phoenix {
    /// Fetches it if need be, and starts it.
    pub fn start(folder: &Path) -> Result<Phoenix> {
        let venv = root().join("target/tools/phoenix");
        if !venv.join("bin/phoenix").exists() {
            println!("installing {PACKAGE}");
            output(program("python3").args(["-m", "venv"]).arg(&venv))?;
            let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE];
            output(program(venv.join("bin/python")).args(pip))?;
        }
        let (at, grpc) = (free_address()?, free_address()?);
        let log = File::create(folder.join("phoenix.log"))?;
        let running = program(venv.join("bin/phoenix"))
            .arg("serve")
            .env("PHOENIX_WORKING_DIR", folder)
            .env("PHOENIX_HOST", "127.0.0.1")
            .env("PHOENIX_PORT", at.port().to_string())
            .env("PHOENIX_GRPC_PORT", grpc.port().to_string())
            .env("PHOENIX_TELEMETRY_ENABLED", "false")
            .stdout(log.try_clone()?)
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()?;
        let phoenix = Phoenix { at, _running: Running(running) };
        wait_for("Phoenix", Duration::from_secs(120), || {
            ask(at, "GET", "/healthz", "", "").is_ok_and(|(s, _)| s == 200)
        })?;
        Ok(phoenix)
    }

    /// Where spans are sent.
    pub fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    fn spans(&self, trace: &str) -> Result<Vec<Value>> {
        let (status, body) = ask(self.at, "GET", "/v1/projects/default/spans?limit=1000", "", "")?;
        ensure!(status == 200, "{status}: {body}");
        let body: Value =
            serde_json::from_str(&body[body.find('{').unwrap_or(0)..=body.rfind('}').unwrap_or(0)])?;
        let all = body["data"].as_array().context("no spans")?;
        Ok(all.iter().filter(|span| span["context"]["trace_id"] == trace).cloned().collect())
    }

    /// The request's spans have their names and parents; its page is kept as a picture.
    pub fn check(&self, trace: &str, folder: &Path) -> Result<()> {
        wait_for("the trace", Duration::from_secs(30), || {
            self.spans(trace).is_ok_and(|spans| spans.len() > TREE.len())
        })?;
        let spans = self.spans(trace)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let names: BTreeMap<String, String> =
            spans.iter().map(|s| (text(&s["context"]["span_id"]), text(&s["name"]))).collect();
        let mut tree: Vec<(String, String)> = spans
            .iter()
            .filter_map(|span| Some((text(&span["name"]), names.get(span["parent_id"].as_str()?)?.clone())))
            .collect();
        tree.sort();
        let mut expected = TREE.map(|(name, parent)| (name.to_owned(), parent.to_owned())).to_vec();
        expected.sort();
        ensure!(tree == expected, "the tree is {tree:#?}");
        println!("Phoenix has the trace's {} spans, each under its parent", spans.len());
        self.picture(trace, folder)
    }

    fn picture(&self, trace: &str, folder: &Path) -> Result<()> {
        if !works("chromium", &["--version"]) {
            println!("SKIPPED: no chromium, so there is no picture of the trace's page");
            return Ok(());
        }
        let (_, body) = ask(self.at, "GET", "/v1/projects", "", "")?;
        let body: Value =
            serde_json::from_str(&body[body.find('{').unwrap_or(0)..=body.rfind('}').unwrap_or(0)])?;
        let project = body["data"].as_array().into_iter().flatten().find(|p| p["name"] == "default");
        let project = project.and_then(|p| p["id"].as_str()).context("no project")?;
        let file = folder.join("trace.png");
        let url = format!("{}/projects/{project}/traces/{trace}", self.url());
        let mut chromium = program("chromium");
        chromium.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
        ]);
        chromium.args([
            "--disable-background-networking",
            "--window-size=1600,1000",
            "--virtual-time-budget=20000",
        ]);
        chromium.arg(format!("--user-data-dir={}", folder.join("chromium").display()));
        chromium.arg(format!("--screenshot={}", file.display())).arg(url);
        output(&mut chromium)?;
        println!("a picture of the trace's page: {}", file.display());
        Ok(())
    }
}
