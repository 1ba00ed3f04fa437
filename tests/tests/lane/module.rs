//! What the first lane of a host brings along: kernel modules, and nothing else.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use nix::{
    errno::Errno,
    kmod::{DeleteModuleFlags, delete_module},
    sys::stat::Mode,
    unistd::mkfifo,
};
use tests::lab::{
    lent::{Lent, dismiss},
    module::load,
    scratch::Scratch,
    topology::Lab,
    transcript::note,
    trial::{Need, Skip, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial(
        "module::the_first_ifb_brings_no_devices",
        &[Need::Root, Need::Injector],
        the_first_ifb_brings_no_devices,
    )]
}

/// Where a virtual machine keeps the modules that it has loaded.
const MODULE: &str = "/modules/ifb.ko";
/// The program that the kernel has load modules.
const LOADER: &str = "/proc/sys/kernel/modprobe";

/// A loader of modules: a script that hands its arguments to this process, which loads what it is asked for and notes
/// what that was. Dropping it gives the machine its own one back, and the module as other tests need it.
struct Loader {
    scratch: Scratch,
    before: String,
}

impl Loader {
    fn install() -> Result<Self> {
        let loader = Self {
            scratch: Scratch::new()?,
            before: fs::read_to_string(LOADER)?,
        };
        for pipe in ["asked", "answer"] {
            mkfifo(&loader.path(pipe), Mode::S_IRWXU)?;
        }
        let script = loader.path("modprobe");
        let text = format!(
            "#!/bin/bash\necho \"$@\" > {}\nread answer < {}\n",
            loader.path("asked").display(),
            loader.path("answer").display()
        );
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700))?;
        fs::write(LOADER, script.as_os_str().as_encoded_bytes())?;
        Ok(loader)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Serves until it is asked for `end`, and always answers: who asks waits for it. Returns the first error.
    fn serve(&self) -> Result<()> {
        let mut served = Ok(());
        loop {
            let mut asked = String::new();
            BufReader::new(File::open(self.path("asked"))?).read_line(&mut asked)?;
            note(format!("asked to load: {asked}"));
            if asked.trim() == "end" {
                return served;
            }
            served = served.and(serve_one(&asked));
            writeln!(
                OpenOptions::new().write(true).open(self.path("answer"))?,
                "done"
            )?;
        }
    }

    fn end(&self) -> Result<()> {
        let mut pipe = OpenOptions::new().write(true).open(self.path("asked"))?;
        Ok(writeln!(pipe, "end")?)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        if let Err(error) = fs::write(LOADER, &self.before) {
            note(format!("the loader of modules stays another one: {error}"));
        }
        if let Err(error) = load(Path::new(MODULE), "numifbs=0") {
            note(format!("{error:#}"));
        }
    }
}

/// Loads ifb, if that is asked for.
fn serve_one(asked: &str) -> Result<()> {
    let arguments = asked.split_once("-- ").context("without --")?.1;
    let (module, parameters) = arguments.trim().split_once(' ').unwrap_or((arguments, ""));
    if ["ifb", "rtnl-link-ifb"].contains(&module.trim()) {
        load(Path::new(MODULE), parameters)?;
    }
    Ok(())
}

/// The kernel's own way of loading ifb makes `ifb0` and `ifb1`.
fn the_first_ifb_brings_no_devices() -> Result<()> {
    if !Path::new(MODULE).exists() {
        return Err(Skip {
            reason: "only for a machine that can do without its ifb module".to_owned(),
            excusable: true,
        }
        .into());
    }
    dismiss();
    let lab = Lab::pair()?;
    let a = lab.a();
    let injector = Lent::new()?;
    let loader = Loader::install()?;
    wait_until(
        "ifb can be unloaded",
        Duration::from_secs(20),
        || match delete_module(c"ifb", DeleteModuleFlags::O_NONBLOCK) {
            Ok(()) => Ok(true),
            Err(Errno::EWOULDBLOCK) => Ok(false),
            Err(error) => Err(error).context("unloading ifb"),
        },
    )?;
    let added = thread::scope(|scope| {
        let serving = scope.spawn(|| loader.serve());
        let added = injector.add(&format!(
            "slow --netns {} --iface eth0 --all-traffic --delay 20ms",
            a.netns()
        ));
        loader.end()?;
        serving
            .join()
            .map_err(|_| anyhow!("the loader panicked"))??;
        added
    });
    added?;
    ensure!(
        Path::new("/sys/module/ifb").exists(),
        "there is a lane without ifb"
    );
    for name in ["ifb0", "ifb1"] {
        ensure!(
            !Path::new("/sys/class/net").join(name).exists(),
            "the first lane has brought {name}"
        );
    }
    Ok(())
}
