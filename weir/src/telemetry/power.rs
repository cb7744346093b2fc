//! Power, where this machine's sensors and counters can be read: Linux' RAPL and hwmon, NVIDIA's NVML.
//!
//! RAPL's counters are readable by root alone on most systems. What isn't there, or can't be read, isn't told.
use super::metrics::Family;
use super::names;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Counters and sensors that are told of, at most.
const SENSORS_MAX: usize = 64;

/// What can be read now.
pub(super) fn families() -> Vec<Family> {
    let (mut power, mut energy) = (Family::new(&names::POWER), Family::new(&names::ENERGY));
    for (device, joules) in rapl(Path::new("/sys/class/powercap")) {
        energy.push(&[(names::L_DEVICE, &device)], joules);
    }
    for (device, watts) in hwmon(Path::new("/sys/class/hwmon")).into_iter().chain(gpus()) {
        power.push(&[(names::L_DEVICE, &device)], watts);
    }
    vec![power, energy]
}

/// NVIDIA's GPUs, where their management library is.
#[cfg(any(target_os = "linux", target_os = "windows"))]
fn gpus() -> BTreeMap<String, f64> {
    weir_backends::nvml::power().into_iter().map(|(name, watts)| (name, f64::from(watts))).collect()
}

#[cfg(not(any(target_os = "linux", target_os = "windows")))]
fn gpus() -> BTreeMap<String, f64> {
    BTreeMap::new()
}

/// Joules by zone: `package-0`, `dram`, ...
fn rapl(folder: &Path) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    for zone in folders(folder) {
        let Some(name) = text(&zone.join("name")) else { continue };
        let Some(micro) = number(&zone.join("energy_uj")) else { continue };
        // Zones below others have their parent's number in their folder's name: intel-rapl:0:1.
        let id = zone.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let at = id.split_once(':').map_or("", |(_, at)| at);
        found.insert(format!("{name} {at}").trim().to_owned(), micro / 1e6);
    }
    found
}

/// Watts by chip and sensor.
fn hwmon(folder: &Path) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    for chip in folders(folder) {
        let name = text(&chip.join("name")).unwrap_or_else(|| "hwmon".into());
        for sensor in 1..=8 {
            let value = ["average", "input"]
                .iter()
                .find_map(|kind| number(&chip.join(format!("power{sensor}_{kind}"))));
            if let Some(micro) = value {
                let label = text(&chip.join(format!("power{sensor}_label")));
                found.insert(format!("{name} {}", label.unwrap_or_else(|| sensor.to_string())), micro / 1e6);
            }
        }
    }
    found
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).take(SENSORS_MAX).collect();
    all.sort();
    all
}

fn text(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn number(path: &Path) -> Option<f64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sensors_are_read_where_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        write("rapl/intel-rapl:0/name", "package-0\n");
        write("rapl/intel-rapl:0/energy_uj", "2500000\n");
        write("rapl/intel-rapl:0:1/name", "dram\n");
        write("rapl/intel-rapl:0:1/energy_uj", "x\n");
        write("hwmon/hwmon0/name", "amdgpu\n");
        write("hwmon/hwmon0/power1_average", "35000000\n");
        write("hwmon/hwmon0/power1_label", "PPT\n");
        write("hwmon/hwmon1/name", "nvme\n");
        let rapl = rapl(&folder.path().join("rapl"));
        assert_eq!(rapl.into_iter().collect::<Vec<_>>(), [("package-0 0".to_owned(), 2.5)]);
        let hwmon = hwmon(&folder.path().join("hwmon"));
        assert_eq!(hwmon.into_iter().collect::<Vec<_>>(), [("amdgpu PPT".to_owned(), 35.0)]);
        assert!(super::rapl(Path::new("/nowhere")).is_empty());
    }
}
