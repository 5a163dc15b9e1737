from tests import models
from peft_posthoc import extract
def test_x(llama_pair, tmp_path):
    b,t=llama_pair
    ad=extract(b,t,32); ad.save(tmp_path/"o")
    m=models.load_adapter(b,tmp_path/"o")
    d=models.lora_deltas(m); td=models.true_deltas(b,t)
    for k,v in d.items(): assert (v-td[k+".weight"]).abs().max()<1e-6
