//! The `injector` command. Everything is in the library: see `injector::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    injector::cli::main(std::env::args_os())
}
