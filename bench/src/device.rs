//! Facts about the machine for the report's header.
//!
//! Owns asking for them (`nvidia-smi`, `/proc/cpuinfo`) and judging what makes numbers doubtful. What nobody tells is
//! absent, never made up. It must not run anything on the device.

use std::process::Command;
use std::thread::available_parallelism;

use crate::results::{DeviceFacts, DeviceKind, DeviceState};

/// Clocks may move by this share before the report warns.
const CLOCK_TOLERANCE: f64 = 0.03;
/// Bits of NVML's clocks event reasons that do not make a number doubtful: idle, and clocks set by the user.
const HARMLESS_REASONS: u64 = 0x1 | 0x2;

/// Whoever knows a device's state.
pub trait Probe {
    /// The device's facts; the host's are filled in by the caller.
    fn gpu(&self) -> Option<GpuFacts>;
    /// Its state now.
    fn state(&self) -> Option<DeviceState>;
}

/// A GPU, as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    /// Name.
    pub name: String,
    /// Driver version.
    pub driver: Option<String>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
}

/// A probe for machines without a GPU.
pub struct NoGpu;

impl Probe for NoGpu {
    fn gpu(&self) -> Option<GpuFacts> {
        None
    }

    fn state(&self) -> Option<DeviceState> {
        None
    }
}

/// Asks `nvidia-smi` about one GPU.
pub struct NvidiaSmi {
    /// Its PCI bus id: CUDA numbers GPUs in another order than the driver does.
    pub id: String,
}

const FACTS: &str = "name,driver_version,memory.total";
const STATE: &str =
    "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,clocks_event_reasons.active";
/// What older drivers call the last field.
const STATE_BEFORE_R535: &str = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,clocks_throttle_reasons.active";

impl NvidiaSmi {
    fn query(&self, fields: &str) -> Option<Vec<Option<String>>> {
        let output = Command::new("nvidia-smi")
            .args([
                "--format=csv,noheader,nounits",
                &format!("--query-gpu={fields}"),
                &format!("--id={}", self.id),
            ])
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        parse_csv(
            &String::from_utf8(output.stdout).ok()?,
            fields.split(',').count(),
        )
    }
}

impl Probe for NvidiaSmi {
    fn gpu(&self) -> Option<GpuFacts> {
        let fields = self.query(FACTS)?;
        Some(GpuFacts {
            name: fields[0].clone()?,
            driver: fields[1].clone(),
            memory_mib: fields[2].as_deref().and_then(|text| text.parse().ok()),
        })
    }

    fn state(&self) -> Option<DeviceState> {
        let fields = self
            .query(STATE)
            .or_else(|| self.query(STATE_BEFORE_R535))?;
        Some(state_of(&fields))
    }
}

/// The first line of `nvidia-smi`'s CSV, what it does not support as `None`; `None` where the count is another.
fn parse_csv(text: &str, count: usize) -> Option<Vec<Option<String>>> {
    let fields: Vec<Option<String>> = text
        .lines()
        .next()?
        .split(',')
        .map(str::trim)
        .map(|field| {
            (!field.is_empty() && !field.starts_with('[') && field != "N/A")
                .then(|| field.to_owned())
        })
        .collect();
    (fields.len() == count).then_some(fields)
}

fn state_of(fields: &[Option<String>]) -> DeviceState {
    let number = |at: usize| fields.get(at)?.as_deref()?.parse().ok();
    DeviceState {
        sm_clock_mhz: number(0),
        memory_clock_mhz: number(1),
        temperature_c: number(2),
        power_w: number(3),
        utilization_percent: number(4),
        throttle_reasons: fields.get(5).cloned().flatten(),
    }
}

/// The facts of a device before anything is measured.
pub fn facts(kind: DeviceKind, probe: &dyn Probe) -> DeviceFacts {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let host_cpu =
        cpu_name(&cpuinfo).unwrap_or_else(|| format!("an {} processor", std::env::consts::ARCH));
    let gpu = match kind {
        DeviceKind::Cuda => probe.gpu(),
        DeviceKind::Cpu => None,
    };
    let name = match (kind, &gpu) {
        (_, Some(gpu)) => gpu.name.clone(),
        (DeviceKind::Cuda, None) => "a CUDA GPU (nvidia-smi does not say which)".to_owned(),
        (DeviceKind::Cpu, None) => format!("CPU: {host_cpu}"),
    };
    DeviceFacts {
        kind,
        name,
        driver: gpu.as_ref().and_then(|gpu| gpu.driver.clone()),
        memory_mib: gpu.as_ref().and_then(|gpu| gpu.memory_mib),
        host_cpu,
        host_threads: available_parallelism().map_or(1, usize::from),
        os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        bandwidth_gb_s: None,
        before: None,
        after: None,
        warnings: match kind {
            DeviceKind::Cuda => in_use(probe.state().as_ref()),
            DeviceKind::Cpu => Vec::new(),
        },
    }
}

/// Notes the states after the first run and after the last one, and what is wrong with the two. The first run has raised
/// the clocks: those of an idle GPU say nothing.
pub fn finish(facts: &mut DeviceFacts, first: Option<DeviceState>, probe: &dyn Probe) {
    if facts.kind == DeviceKind::Cuda {
        facts.before = first;
        facts.after = probe.state();
    }
    let found = warnings(facts.before.as_ref(), facts.after.as_ref());
    facts.warnings.extend(found);
}

/// A warning where others use the GPU.
fn in_use(idle: Option<&DeviceState>) -> Vec<String> {
    let used = idle.and_then(|state| state.utilization_percent);
    used.filter(|used| *used > 5.0)
        .map(|used| {
            format!("the GPU was {used:.0} % in use before the run; close other GPU processes")
        })
        .into_iter()
        .collect()
}

fn cpu_name(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name") || line.starts_with("Model"))?;
    let name = line.split_once(':')?.1.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

fn warnings(before: Option<&DeviceState>, after: Option<&DeviceState>) -> Vec<String> {
    let mut warnings = Vec::new();
    let (Some(before), Some(after)) = (before, after) else {
        return warnings;
    };
    for (clock, was, is) in [
        ("memory", before.memory_clock_mhz, after.memory_clock_mhz),
        ("SM", before.sm_clock_mhz, after.sm_clock_mhz),
    ] {
        let moved = was
            .zip(is)
            .filter(|(was, is)| (is - was).abs() > CLOCK_TOLERANCE * was);
        if let Some((was, is)) = moved {
            warnings.push(format!(
                "the {clock} clock moved from {was:.0} to {is:.0} MHz during the run"
            ));
        }
    }
    if let Some(reasons) = &after.throttle_reasons {
        let bits = u64::from_str_radix(reasons.trim_start_matches("0x"), 16).unwrap_or(0);
        if bits & !HARMLESS_REASONS != 0 {
            warnings.push(format!(
                "clocks are held down (reasons {reasons}): power, heat or hardware"
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidia_smi_lines() {
        let fields =
            parse_csv("1980, 2619, 41, 123.45, 0, 0x0000000000000001\n", 6).expect("six fields");
        let state = state_of(&fields);
        assert_eq!(
            (state.sm_clock_mhz, state.power_w),
            (Some(1980.0), Some(123.45))
        );
        assert_eq!(
            state.throttle_reasons.as_deref(),
            Some("0x0000000000000001")
        );
        let fields = parse_csv("NVIDIA X, [N/A], [Not Supported]", 3).expect("three fields");
        assert_eq!(fields, [Some("NVIDIA X".to_owned()), None, None]);
        assert_eq!(parse_csv("", 3), None);
        assert_eq!(parse_csv("No devices were found", 3), None);
    }

    #[test]
    fn clocks_that_move_are_told() {
        let state = |sm, reasons: &str, used| DeviceState {
            sm_clock_mhz: Some(sm),
            throttle_reasons: Some(reasons.to_owned()),
            utilization_percent: Some(used),
            ..DeviceState::default()
        };
        let check = |before, after| warnings(Some(&before), Some(&after)).len();
        assert_eq!(
            check(state(1980.0, "0x0", 0.0), state(1975.0, "0x1", 0.0)),
            0
        );
        assert_eq!(
            check(state(1980.0, "0x0", 0.0), state(1500.0, "0x0", 0.0)),
            1
        );
        assert_eq!(
            check(
                state(1980.0, "0x0", 0.0),
                state(1980.0, "0x0000000000000004", 0.0)
            ),
            1
        );
        assert!(warnings(None, None).is_empty());
        assert_eq!(in_use(Some(&state(1980.0, "0x0", 60.0))).len(), 1);
        assert_eq!(in_use(Some(&state(1980.0, "0x0", 0.0))).len(), 0);
        assert_eq!(in_use(None).len(), 0);
    }

    #[test]
    fn processors_have_names() {
        assert_eq!(
            cpu_name("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n").as_deref(),
            Some("Some CPU @ 2 GHz")
        );
        assert_eq!(cpu_name(""), None);
        let facts = facts(DeviceKind::Cpu, &NoGpu);
        assert!(
            facts.name.starts_with("CPU: ") && facts.host_threads >= 1 && facts.before.is_none()
        );
    }
}
