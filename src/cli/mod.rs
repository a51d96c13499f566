//! The command line, as `clap` reads it.
//!
//! Every subcommand has its arguments in a type of its own and ends in one function call. What can be said about a
//! machine is said through [`MachineArgs`], which puts the options over a machine file and hands out the one
//! description ([`crate::config::Machine`]).

mod machine;

pub use self::machine::MachineArgs;
