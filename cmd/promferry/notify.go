package main

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// notifier tells systemd how the daemon is. Without systemd it does nothing.
type notifier struct {
	logger   *slog.Logger
	watchdog time.Duration // 0 when systemd does not ask for it
}

// statusInterval is how often systemd is told the status when no watchdog asks for more.
const statusInterval = 10 * time.Second

func newNotifier(logger *slog.Logger) *notifier {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		logger.Warn("Watchdog of systemd not understood, and not served", "err", err)
	}
	return &notifier{logger: logger, watchdog: watchdog}
}

// interval returns how often alive is to be called: twice in the time of the watchdog
// (sd_watchdog_enabled(3)), and often enough for the status; 0 when nobody listens.
func (n *notifier) interval() time.Duration {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return 0
	}
	if n.watchdog > 0 {
		return min(n.watchdog/2, statusInterval)
	}
	return statusInterval
}

// alive feeds the watchdog and tells the status.
func (n *notifier) alive(status string) {
	// One line: the next one would be an assignment of its own.
	n.send("WATCHDOG=1\nSTATUS=" + strings.Join(strings.Fields(status), " "))
}

func (n *notifier) ready() { n.send(daemon.SdNotifyReady) }

func (n *notifier) reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		n.logger.Warn("Monotonic clock not read", "err", err)
	}
	n.send(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

func (n *notifier) stopping() { n.send(daemon.SdNotifyStopping + "\nSTATUS=Stopping") }

func (n *notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.logger.Warn("Systemd not notified", "err", err)
	}
}
