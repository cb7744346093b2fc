//! What telemetry is told: `weir.toml`, `WEIR_*`, and OpenTelemetry's own variables.
//! <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>
use super::{Config, ConfigError, environment};
use crate::telemetry::{Conventions, ExportConfig, Sampler, Target, Telemetry};
use std::time::Duration;

/// What a collector gets unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);
const DELAY: Duration = Duration::from_secs(5);
const METRICS_EVERY: Duration = Duration::from_secs(60);

impl Config {
    /// What this process tells of itself: `role` is `weir` for a scheduler, `weir-node` for a node, `instance` its name.
    pub fn telemetry(&self, role: &str, instance: &str) -> Result<Telemetry, ConfigError> {
        self.telemetry_from(role, instance, |name| environment(name).filter(|value| !value.trim().is_empty()))
    }

    fn telemetry_from(
        &self,
        role: &str,
        instance: &str,
        set: impl Fn(&str) -> Option<String>,
    ) -> Result<Telemetry, ConfigError> {
        let opted = set("OTEL_SEMCONV_STABILITY_OPT_IN").and_then(|list| Conventions::opted_in(&list));
        let conventions = self.conventions.or(opted).unwrap_or_default();
        let sampler = match set("OTEL_TRACES_SAMPLER") {
            None => Sampler::default(),
            Some(name) => Sampler::named(&name, set("OTEL_TRACES_SAMPLER_ARG").as_deref())
                .ok_or_else(|| wrong(format!("there is no sampler OTEL_TRACES_SAMPLER={name}")))?,
        };
        let export = self.export(role, instance, &set)?;
        Telemetry::new(conventions, sampler, export).map_err(ConfigError::Telemetry)
    }

    fn export(
        &self,
        role: &str,
        instance: &str,
        set: &impl Fn(&str) -> Option<String>,
    ) -> Result<Option<ExportConfig>, ConfigError> {
        if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let endpoint = self.otlp.clone().or_else(|| set("OTEL_EXPORTER_OTLP_ENDPOINT"));
        let target = |signal: &str| {
            let upper = signal.to_ascii_uppercase();
            if set(&format!("OTEL_{upper}_EXPORTER")).is_some_and(|exporter| exporter.trim() == "none") {
                return Ok(None);
            }
            let own = set(&format!("OTEL_EXPORTER_OTLP_{upper}_ENDPOINT"));
            let told = own.as_ref().or(endpoint.as_ref());
            let target = own
                .as_ref()
                .map(|url| Target::exact(url))
                .or_else(|| Some(Target::below(endpoint.as_ref()?, signal)));
            match target {
                None => Ok(None),
                Some(Some(target)) => Ok(Some(target)),
                Some(None) => {
                    let told = told.map_or("", String::as_str);
                    Err(wrong(format!("`{told}` is no address; expected http(s)://HOST[:PORT]")))
                }
            }
        };
        let (traces, metrics) = (target("traces")?, target("metrics")?);
        if traces.is_none() && metrics.is_none() {
            return Ok(None);
        }
        if let Some(protocol) = set("OTEL_EXPORTER_OTLP_PROTOCOL").filter(|p| p.trim() != "http/protobuf") {
            return Err(wrong(format!(
                "OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: only http/protobuf is spoken"
            )));
        }
        let time = |name: &str, usual: Duration| match set(name) {
            None => Ok(usual),
            Some(text) => text
                .trim()
                .parse()
                .map(|ms: u64| Duration::from_millis(ms.clamp(1, 3_600_000)))
                .map_err(|_| wrong(format!("{name}={text} is no number of milliseconds"))),
        };
        let mut resource = pairs(&set("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default());
        // The name says it, whatever the attributes say.
        let named = set("OTEL_SERVICE_NAME");
        resource.retain(|(name, _)| named.is_none() || name != "service.name");
        let mut say = |name: &str, value: String| {
            if !resource.iter().any(|(known, _)| known == name) {
                resource.push((name.to_owned(), value));
            }
        };
        if let Some(name) = named {
            say("service.name", name);
        }
        say("service.name", role.to_owned());
        say("service.version", env!("CARGO_PKG_VERSION").to_owned());
        say("service.instance.id", instance.to_owned());
        say("process.pid", std::process::id().to_string());
        Ok(Some(ExportConfig {
            traces,
            metrics,
            headers: pairs(&set("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default()),
            timeout: time("OTEL_EXPORTER_OTLP_TIMEOUT", TIMEOUT)?,
            delay: time("OTEL_BSP_SCHEDULE_DELAY", DELAY)?,
            metrics_every: time("OTEL_METRIC_EXPORT_INTERVAL", METRICS_EVERY)?,
            resource,
        }))
    }
}

fn wrong(message: String) -> ConfigError {
    ConfigError::Telemetry(message)
}

/// `name=value,name=value`, values percent-encoded where they must be.
fn pairs(list: &str) -> Vec<(String, String)> {
    let pair = |entry: &str| {
        let (name, value) = entry.split_once('=')?;
        Some((name.trim().to_owned(), decoded(value.trim()))).filter(|(name, _)| !name.is_empty())
    };
    list.split(',').filter_map(pair).collect()
}

fn decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| *first == b'%').and_then(|two| std::str::from_utf8(two).ok());
        match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(environment: &[(&str, &str)], otlp: Option<&str>, expected: Result<bool, &str>) {
        let config = Config { otlp: otlp.map(str::to_owned), ..Config::default() };
        let set = |name: &str| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        match (config.telemetry_from("weir", "here", set), expected) {
            (Ok(telemetry), Ok(traces)) => assert_eq!(telemetry.traces(), traces, "{environment:?}"),
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (got, expected) => panic!("{environment:?}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn nothing_leaves_unless_told() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
        check(&[], None, Ok(false));
        check(&[], Some("http://127.0.0.1:9"), Ok(true));
        check(&[endpoint], None, Ok(true));
        check(&[endpoint, ("OTEL_SDK_DISABLED", "true")], None, Ok(false));
        check(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")], None, Ok(false));
        check(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/x")], None, Ok(true));
        check(&[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:9/x")], None, Ok(false));
    }

    #[test]
    fn the_services_name_is_the_one_that_is_named() {
        let config = Config { otlp: Some("http://127.0.0.1:9".into()), ..Config::default() };
        let set = |name: &str| match name {
            "OTEL_SERVICE_NAME" => Some("mine".to_owned()),
            "OTEL_RESOURCE_ATTRIBUTES" => Some("service.name=theirs,a=b".to_owned()),
            _ => None,
        };
        let found = config.export("weir", "here", &set).unwrap().unwrap().resource;
        let names: Vec<&str> =
            found.iter().filter(|(name, _)| name == "service.name").map(|(_, value)| &**value).collect();
        assert_eq!(names, ["mine"]);
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
        check(&[], Some("ftp://x"), Err("`ftp://x` is no address"));
        check(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], None, Err("http/protobuf"));
        check(&[endpoint, ("OTEL_BSP_SCHEDULE_DELAY", "soon")], None, Err("milliseconds"));
        check(&[("OTEL_TRACES_SAMPLER", "dice")], None, Err("dice"));
        check(&[endpoint, ("OTEL_EXPORTER_OTLP_HEADERS", "a b=c")], None, Err("\"a b\""));
    }

    #[test]
    fn lists_are_taken_apart() {
        let check = |list: &str, expected: &[(&str, &str)]| {
            let expected: Vec<(String, String)> =
                expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            assert_eq!(pairs(list), expected, "{list}");
        };
        check("", &[]);
        check("a=b, c = d%20e ,=x,f", &[("a", "b"), ("c", "d e")]);
        check("a=%zz%4", &[("a", "%zz%4")]);
        check("authorization=Basic%20YQ==", &[("authorization", "Basic YQ==")]);
    }
}
