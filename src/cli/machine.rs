//! The options that describe a machine, shared by all subcommands that need one.
//!
//! An option that takes one value replaces what the machine file says; one that can be repeated adds to it.
//! Values are taken as text here and parsed by [`crate::config`], so that errors are the same from every source.

use std::path::PathBuf;

use clap::Args;

use crate::config::{ConfigError, Disk, HostChoice, Machine, PackedFile, Pmem};
use crate::units::{Size, TimeSpan};

/// The options that describe a machine.
#[derive(Debug, Clone, Default, Args)]
pub struct MachineArgs {
    /// Read the machine from this TOML file; options on the command line go over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The kernel: a bzImage (vmlinuz) or an x86-64 vmlinux
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk, after the one that is packed for the agent
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Words to add to the kernel's command line
    #[arg(long, visible_alias = "cmdline", value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub cpus: Option<String>,
    /// RAM [default: 1G]
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// What the guest sees of processors and clocks.
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        help = "What the guest sees of processors and clocks: vendor=host|intel|amd,mca=smca|legacy|intel\
                ,recovery=on|off,lmce=on|off,erms=on|off,hypervisor=on|off,kvmclock=on|off,pm_timer=on|off"
    )]
    pub cpu: Vec<String>,
    /// Persistent memory devices, each as its keys and values.
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        help = "A persistent memory device: file=PATH|size=SIZE[,id=ID][,via=nfit|virtio|e820][,type=7|12|soft]\
                [,channel=container|agent|pcie|bridge|none][,node=N]\
                [,readonly=on|off][,range=pmem|volatile|vdisk|vcd|pdisk|pcd][,at=ADDRESS]\
                [,bus=NAME][,dimms=N|NAME+NAME…][,interleave=SIZE]\
                [,family=intel|msft|none][,labels=init|none|FILE][,flags=not_armed+…]\
                [,ars=TIME][,ars_records=N][,clear_unit=SIZE]\
                [,full_line_store=keep|clear][,unflushed=keep|drop][,lie=NAME]"
    )]
    pub pmem: Vec<String>,
    /// Disks, each as its keys and values.
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        help = "A disk (virtio-blk): file=PATH|size=SIZE[,id=ID][,readonly=on|off][,queues=N]"
    )]
    pub disk: Vec<String>,
    /// Add the memory devices and settings of a preset: nfit_test (the shape of the kernel's mock of NVDIMMs),
    /// nvdimm64 (64 DIMMs on 8 buses), nfit_lies (NFITs that contradict themselves)
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// What may arrive while the machine runs: nfit=N,pcie=N,bridge=N,button=on|off,size=SIZE,dimms=M
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub slots: Vec<String>,
    /// Answer API requests on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// The kernel's modules, a directory .../lib/modules/VERSION [default: beside the kernel, then the host's]
    #[arg(long, value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// Pack this program of the host for the guest, with its libraries
    #[arg(long = "tool", value_name = "NAME|PATH")]
    pub tools: Vec<String>,
    /// Pack this file of the host for the guest
    #[arg(long = "file", value_name = "SOURCE[:TARGET]")]
    pub files: Vec<String>,
    /// Do not pack or start the guest agent
    #[arg(long)]
    pub no_agent: bool,
    /// Give up after this time, with exit status 124
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// Keep results, logs and tables in this directory
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Keep in this directory what outlives the machine
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Where KVM comes from [default: auto]
    #[arg(long, value_enum)]
    pub host: Option<HostChoice>,
}

impl MachineArgs {
    /// The description: defaults, the machine file over them, and the command line over that; with all ids given.
    /// `command` is what comes after `--`; if it is empty the machine file's is kept.
    ///
    /// # Errors
    /// An option or the machine file cannot be parsed. [`Machine::validate`] is still to be asked.
    pub fn machine(&self, command: &[String]) -> Result<Machine, ConfigError> {
        let mut machine = match &self.config {
            Some(path) => Machine::load(path)?,
            None => Machine::default(),
        };
        if let Some(kernel) = &self.kernel {
            machine.kernel.clone_from(kernel);
        }
        if let Some(words) = &self.append {
            machine.cmdline.clone_from(words);
        }
        let paths = [
            (&self.initrd, &mut machine.initrd),
            (&self.api_socket, &mut machine.api_socket),
            (&self.modules, &mut machine.modules),
            (&self.run_dir, &mut machine.run_dir),
            (&self.state, &mut machine.state),
        ];
        for (given, kept) in paths {
            if given.is_some() {
                kept.clone_from(given);
            }
        }
        if let Some(text) = &self.cpus {
            machine.cpus = text.trim().parse().map_err(|_| {
                ConfigError::invalid("--cpus", text, "a number of vCPUs was expected", "give --cpus 1 to 64")
            })?;
        }
        if let Some(text) = &self.memory {
            machine.memory = parse::<Size>("--memory", text)?;
        }
        if let Some(text) = &self.timeout {
            machine.timeout = Some(parse::<TimeSpan>("--timeout", text)?);
        }
        if let Some(host) = self.host {
            machine.host = host;
        }
        if self.no_agent {
            machine.agent = false;
        }
        for text in &self.cpu {
            machine.cpu.apply("--cpu", text)?;
        }
        if let Some(name) = &self.preset {
            machine.apply_preset("--preset", name)?;
        }
        for text in &self.slots {
            machine.slots.apply("--slots", text)?;
        }
        for text in &self.pmem {
            machine.pmem.push(Pmem::parse("--pmem", text)?);
        }
        for text in &self.disk {
            machine.disk.push(Disk::parse("--disk", text)?);
        }
        for text in &self.files {
            machine.files.push(PackedFile::parse("--file", text)?);
        }
        machine.tools.extend(self.tools.iter().cloned());
        if !command.is_empty() {
            machine.command = command.to_vec();
        }
        machine.complete();
        Ok(machine)
    }
}

/// Parses an option's text; the parser's words are `problem: remedy`.
fn parse<T>(option: &str, text: &str) -> Result<T, ConfigError>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| {
        let message = error.to_string();
        let (problem, remedy) = message.split_once(": ").unwrap_or((message.as_str(), "see --help"));
        ConfigError::invalid(option, text, problem, remedy)
    })
}
