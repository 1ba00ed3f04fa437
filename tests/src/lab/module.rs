//! Kernel modules.

use std::{ffi::CString, fs::File, path::Path};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
};

/// Loads an uncompressed module from its file; fine if it is loaded already.
pub fn load(path: &Path, parameters: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    match finit_module(&file, &CString::new(parameters)?, ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("loading module {}", path.display())),
    }
}
