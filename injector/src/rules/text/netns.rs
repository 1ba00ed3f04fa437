//! Network namespaces: a process (`1234`, `pid:1234`), a file (anything with a `/`), or a name as
//! `ip netns` makes them (`lab-n1`; `name:1234` for a name that looks like a process).

use std::path::PathBuf;

use crate::rules::{error::Problem, model::NetnsRef};

const ACCEPTED: &str = "a name below /run/netns, an absolute path, or a process id";

/// Reads a reference to a namespace.
pub fn parse(text: &str) -> Result<NetnsRef, Problem> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if let Some(name) = text.strip_prefix("name:") {
        return named(name);
    }
    let pid = text
        .strip_prefix("pid:")
        .or_else(|| is_number(text).then_some(text));
    if let Some(pid) = pid {
        return match pid.parse::<u32>() {
            Ok(pid)
                if pid > 0
                    && i32::try_from(pid).is_ok()
                    && is_number(text.trim_start_matches("pid:")) =>
            {
                Ok(NetnsRef::Pid(pid))
            }
            _ => Err(Problem::new(
                format!("'{pid}' is not a process id"),
                ACCEPTED,
            )),
        };
    }
    if text.contains('/') {
        if !text.starts_with('/') {
            return Err(Problem::new("is a relative path", ACCEPTED));
        }
        if text.contains('\0') {
            return Err(Problem::new("contains a zero byte", ACCEPTED));
        }
        return Ok(NetnsRef::Path(PathBuf::from(text)));
    }
    named(text)
}

fn named(name: &str) -> Result<NetnsRef, Problem> {
    if name.is_empty() {
        return Err(Problem::new("is empty", ACCEPTED));
    }
    if name == "." || name == ".." || name.contains(['/', '\0']) || name.len() > 255 {
        return Err(Problem::new("cannot be the name of a namespace", ACCEPTED));
    }
    Ok(NetnsRef::Name(name.to_owned()))
}

/// Writes a reference; `None` for the daemon's own namespace.
#[must_use]
pub fn format(netns: &NetnsRef) -> Option<String> {
    Some(match netns {
        NetnsRef::Own => return None,
        NetnsRef::Pid(pid) => format!("pid:{pid}"),
        NetnsRef::Path(path) => path.to_string_lossy().into_owned(),
        NetnsRef::Name(name) => {
            let misread = name.bytes().all(|b| b.is_ascii_digit())
                || name.starts_with("pid:")
                || name.starts_with("name:");
            if misread {
                format!("name:{name}")
            } else {
                name.clone()
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, netns, shown) in [
            ("lab-n1", NetnsRef::Name("lab-n1".into()), "lab-n1"),
            ("1234", NetnsRef::Pid(1234), "pid:1234"),
            ("pid:1234", NetnsRef::Pid(1234), "pid:1234"),
            ("name:1234", NetnsRef::Name("1234".into()), "name:1234"),
            ("name:pid:1", NetnsRef::Name("pid:1".into()), "name:pid:1"),
            (
                "/proc/1/ns/net",
                NetnsRef::Path("/proc/1/ns/net".into()),
                "/proc/1/ns/net",
            ),
        ] {
            assert_eq!(parse(text).unwrap(), netns);
            assert_eq!(format(&netns).as_deref(), Some(shown));
            assert_eq!(parse(shown).unwrap(), netns);
        }
        for bad in [
            "",
            "0",
            "pid:",
            "pid:x",
            "pid:+1",
            "4294967295",
            "a/b",
            "..",
            "name:",
            "name:a/b",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
