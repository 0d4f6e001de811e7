package forwarder

// OnStep has f called before and after each write of the ledger.
func (l *Ledger) OnStep(f func(step string)) { l.step = f }
