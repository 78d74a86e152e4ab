//! What the machine has, and what this process took of it.

use std::fs;
use std::path::Path;

/// Memory that could be taken without pushing anything out, in bytes, where the system tells: on Linux what is available
/// or, if lower, the limit of a control group that this process is in.
#[must_use]
pub fn available_memory() -> Option<usize> {
    let available = kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(control_group_limits().into_iter().fold(available, usize::min))
}

/// The most memory that this process had at once, where the system tells.
#[must_use]
pub fn peak_memory() -> Option<usize> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// All memory that the machine has, in bytes, where the system tells.
#[must_use]
pub fn total_memory() -> Option<usize> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// What the processor calls itself, where the system tells.
#[must_use]
pub fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}

/// The value of a line such as `VmHWM:   123456 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Limits of the group of this process and of those around it. A group without one says `max`.
fn control_group_limits() -> Vec<usize> {
    let mut limits = Vec::new();
    for line in fs::read_to_string("/proc/self/cgroup").unwrap_or_default().lines() {
        // `0::/user.slice/a` in version 2, `7:memory:/docker/a` in version 1
        let (root, file, group) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "", group] => ("/sys/fs/cgroup", "memory.max", group),
            [_, names, group] if names.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", group)
            }
            _ => continue,
        };
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            let text = fs::read_to_string(Path::new(root).join(group).join(file)).unwrap_or_default();
            limits.extend(text.trim().parse::<usize>());
        }
    }
    limits
}

/// Whether a host of an address is this machine: `localhost`, `127.0.0.1`, `[::1]`, with or without a port.
pub(crate) fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc() {
        let text = "MemTotal:       24530396 kB\nMemAvailable:   22000000 kB\n";
        assert_eq!(kibibytes(text, "MemAvailable:"), Some(22_000_000 * 1024));
        assert_eq!(kibibytes(text, "MemFree:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_takes_less_than_the_machine_has() {
        let (taken, available) = (peak_memory().expect("known"), available_memory().expect("known"));
        assert!(taken > 1 << 20 && available > 1 << 20);
    }
}
