package outbox

// OnStep has f called before each step of a write or a delivery.
func (o *Outbox) OnStep(f func(step string)) { o.step = f }
