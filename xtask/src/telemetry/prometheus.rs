//! Prometheus itself, and what it is asked.
use super::cluster::Cluster;
use super::{Running, ask, free_address, wait_for};
use crate::deploy;
use crate::run::{program, root};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// In place of Grafana's variables.
const VARIABLES: [(&str, &str); 3] = [("$__rate_interval", "30s"), ("$__range", "5m"), ("$job", ".*")];

/// Scrapes every second.
pub struct Prometheus {
    at: SocketAddr,
    _running: Running,
}

impl Prometheus {
    /// Starts one that scrapes these.
    pub fn start(folder: &Path, scraped: &[SocketAddr]) -> Result<Prometheus> {
        let at = free_address()?;
        let rules = root().join("deploy/prometheus/alerts.yml");
        let jobs: Vec<String> = scraped
            .iter()
            .enumerate()
            .map(|(number, at)| {
                let job = if number == 0 { "weir" } else { "weir-node" };
                format!("      - targets: ['{at}']\n        labels: {{ job: {job} }}\n")
            })
            .collect();
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [{rules:?}]\nscrape_configs:\n  - \
             job_name: weir\n    static_configs:\n{}",
            jobs.concat()
        );
        let file = folder.join("prometheus.yml");
        std::fs::write(&file, config)?;
        let log = File::create(folder.join("prometheus.log"))?;
        let running = program("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("tsdb").display()))
            .arg(format!("--web.listen-address={at}"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let prometheus = Prometheus { at, _running: Running(running) };
        wait_for("Prometheus", Duration::from_secs(30), || {
            ask(at, "GET", "/-/ready", "", "").is_ok_and(|(s, _)| s == 200)
        })?;
        Ok(prometheus)
    }

    /// Asks what every panel and every alert asks.
    pub fn check(&self, cluster: &Cluster) -> Result<()> {
        for at in cluster.scraped() {
            // A node that was killed says nothing any more.
            let Ok((_, text)) = ask(at, "GET", "/metrics", "", "") else { continue };
            lint(&text)?;
        }
        let (mut asked, mut empty, mut excused) = (0, Vec::new(), Vec::new());
        for dashboard in deploy::ALL {
            for panel in dashboard.panels() {
                for (query, _) in panel.queries {
                    let query =
                        VARIABLES.iter().fold((*query).to_owned(), |q, (name, value)| q.replace(name, value));
                    let shown = format!("{} / {}: {query}", dashboard.name, panel.title);
                    asked += 1;
                    match (self.has_data(&query).with_context(|| shown.clone())?, panel.absent) {
                        (true, _) => {}
                        (false, Some(why)) => excused.push(format!("{shown} ({why})")),
                        (false, None) => empty.push(shown),
                    }
                }
            }
        }
        println!("{asked} queries of {} dashboards asked", deploy::ALL.len());
        excused.iter().for_each(|shown| println!("NO DATA HERE: {shown}"));
        ensure!(empty.is_empty(), "these panels have no data:\n{}", empty.join("\n"));
        self.alerts()
    }

    fn get(&self, path: &str) -> Result<Value> {
        let (status, body) = ask(self.at, "GET", path, "accept-encoding: identity\r\n", "")?;
        // Chunk sizes stand around it.
        let (start, end) = (body.find('{').unwrap_or(0), body.rfind('}').map_or(body.len(), |at| at + 1));
        let value: Value =
            serde_json::from_str(&unchunked(&body[start..end])).with_context(|| body.clone())?;
        ensure!(status == 200 && value["status"] == "success", "{value}");
        Ok(value["data"].clone())
    }

    /// Whether there is a number: what is not a number is none.
    fn has_data(&self, query: &str) -> Result<bool> {
        let encoded: String = query.bytes().map(|b| format!("%{b:02X}")).collect();
        let data = self.get(&format!("/api/v1/query?query={encoded}"))?;
        let results = data["result"].as_array().context("no result")?;
        Ok(results.iter().any(|r| r["value"][1].as_str().is_some_and(|v| v != "NaN")))
    }

    fn alerts(&self) -> Result<()> {
        let data = self.get("/api/v1/rules?type=alert")?;
        let rules = data["groups"][0]["rules"].as_array().context("no rules")?;
        for rule in rules {
            if rule["health"] != "ok" {
                bail!("alert {} is {}: {}", rule["name"], rule["health"], rule["lastError"]);
            }
        }
        let firing: Vec<&str> =
            rules.iter().filter(|r| r["state"] != "inactive").filter_map(|r| r["name"].as_str()).collect();
        println!("{} alerts evaluated, not inactive: {}", rules.len(), firing.join(", "));
        Ok(())
    }
}

/// Long answers come in chunks: each has its length in hexadecimal on a line of its own before it.
fn unchunked(body: &str) -> String {
    let is_size =
        |line: &str| !line.is_empty() && line.len() <= 6 && line.bytes().all(|b| b.is_ascii_hexdigit());
    body.split("\r\n").filter(|line| !is_size(line)).collect()
}

/// `promtool check metrics`.
fn lint(text: &str) -> Result<()> {
    let mut promtool = program("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    promtool.stdin.take().context("its input")?.write_all(text.as_bytes())?;
    let out = promtool.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.success() && said.trim().is_empty(), "promtool check metrics: {said}");
    Ok(())
}
