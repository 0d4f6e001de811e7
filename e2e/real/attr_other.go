//go:build unix && !linux

package real

import "syscall"

// attributes cannot ask other systems to end the process when this one is killed.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
