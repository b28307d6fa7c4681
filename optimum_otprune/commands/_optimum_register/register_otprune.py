"""Makes `optimum-cli otprune` known; nothing heavy may be imported here."""

from optimum_otprune.commands.parser import OTPruneCommand

REGISTER_COMMANDS = [OTPruneCommand]
