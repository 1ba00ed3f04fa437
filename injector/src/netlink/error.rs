//! What a netlink or bpf request can fail with, in words that say what to do.

use std::io;

/// Why a request to the kernel failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// No netlink socket could be had.
    #[error("cannot {what}: opening a netlink socket failed: {source}")]
    Open {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Sending or receiving failed.
    #[error("cannot {what}: talking to the kernel over netlink failed: {source}")]
    Transfer {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel said no.
    #[error("cannot {what}: {source}{}{}", said(kernel.as_deref()), hint(source))]
    Refused {
        /// What was attempted, on what.
        what: String,
        /// The error number.
        source: io::Error,
        /// The kernel's own words (extended acknowledgement), where it had any.
        kernel: Option<String>,
    },
    /// The kernel's answer could not be understood.
    #[error("cannot {what}: the kernel's answer is malformed ({detail})")]
    Malformed {
        /// What was attempted, on what.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The tables kept changing while they were read.
    #[error("cannot {what}: it changed under every one of {tries} attempts; try again")]
    Interrupted {
        /// What was attempted.
        what: String,
        /// So many attempts.
        tries: u32,
    },
}

/// The kernel's own words as a part of a message.
fn said(kernel: Option<&str>) -> String {
    kernel.map_or_else(String::new, |text| {
        format!(" (kernel: {})", text.trim_end_matches('.'))
    })
}

/// What to do about an error, as the end of its message.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run as root",
        Some(libc::ENODEV | libc::ENXIO) => "; the interface may have been deleted",
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
            "; `injector check` shows what this kernel offers"
        }
        _ => "",
    }
}

impl NetlinkError {
    /// The error number with which the kernel refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the interface that was named does not exist (any more).
    #[must_use]
    pub fn is_no_device(&self) -> bool {
        matches!(self.errno(), Some(libc::ENODEV | libc::ENXIO))
    }
}
